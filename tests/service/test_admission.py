"""The door: a permit or an error at once."""

from __future__ import annotations

import pytest

from app.errors import OverloadedError, UnavailableError
from app.service.admission import Admission


def test_a_permit_comes_back_however_its_holder_ends() -> None:
    admission = Admission(1)
    with pytest.raises(KeyError), admission.permit():
        raise KeyError
    with admission.permit():
        assert admission.in_flight == 1
        with pytest.raises(OverloadedError) as raised, admission.permit():
            pass
        assert raised.value.retry_after_s > 0
    assert admission.in_flight == 0


def test_a_look_at_the_door_takes_nothing() -> None:
    admission = Admission(1)
    admission.check()
    assert admission.in_flight == 0
    with admission.permit(), pytest.raises(OverloadedError):
        admission.check()
    admission.drain()
    with pytest.raises(UnavailableError):
        admission.check()


def test_draining_lets_nobody_in_and_keeps_those_inside() -> None:
    admission = Admission(2)
    with admission.permit():
        admission.drain()
        with pytest.raises(UnavailableError), admission.permit():
            pass
        assert admission.in_flight == 1
