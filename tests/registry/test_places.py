"""A URL names a place and may hold a password, which no error tells."""

from __future__ import annotations

import pytest

from app.errors import SettingsError, UnavailableError
from app.registry.places import open_place, reaching, without_user


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://user:secret@bucket/x", "s3://…@bucket/x"),
        ("s3://user:se/cr@et@bucket/x", "s3://…@bucket/x"),
        ("s3://se@cret@bucket/x", "s3://…@bucket/x"),
        ("s3://user:se%2Fcr%40et@bucket/x", "s3://…@bucket/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("sftp://host:22/a@b", "sftp://host:22/a@b"),
        ("sftp://user:secret@host:22/a@b c", "sftp://…@b c"),
        ("/var/log/a@b", "/var/log/a@b"),
    ],
)
def test_a_url_is_shown_without_its_user(url: str, shown: str) -> None:
    assert without_user(url) == shown


@pytest.mark.parametrize(
    "told",
    ['Invalid bucket name "user:p%2Fw"', 'Invalid bucket name "user:p/w"', "p/w is wrong", "s3://user:p%2Fw@b: no"],
)
def test_a_packages_own_words_hold_no_password(told: str) -> None:
    with pytest.raises(UnavailableError) as caught, reaching("the log", "read", "s3://user:p%2Fw@bucket/x"):
        raise ValueError(told)
    assert "…" in str(caught.value) and "p/w" not in str(caught.value) and "p%2Fw" not in str(caught.value)


def test_a_place_that_cannot_be_opened_is_named_without_its_user() -> None:
    with pytest.raises(SettingsError, match="nothing://…@host/log is no place for predictions") as caught:
        open_place("nothing://user:secret@host/log", "predictions")
    assert "secret" not in str(caught.value)
