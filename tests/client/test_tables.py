"""How values become words."""

from __future__ import annotations

from typing import Any

import pytest

from app.client.tables import size, when
from app.rollout import value_in_words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"version": 2, "digest": "sha256:ab", "state": "approved"}, "version 2 approved"),
        ({"traffic": {"champion": 1, "challengers": [{"version": 2, "percent": 2.5}]}}, None),
        ({"traffic": None}, "none"),
        ({"name": "olga", "roles": ["admin", "operate"], "id": None}, "name olga, roles admin operate"),
        (0.25, "0.25"),
    ],
)
def test_what_the_audit_log_holds_is_one_line(value: Any, words: str | None) -> None:
    assert value_in_words(value) == (words or "champion 1, challenger 2 at 2.5 %")


def test_times_and_sizes_have_their_unit() -> None:
    assert when(1_700_000_000.5) == "2023-11-14 22:13:20Z"
    assert (size(750_500), size(2_000_000)) == ("750.5 kB", "2.0 MB")
