"""Places behind fsspec URLs: opened, named without credentials, and their packages' exceptions made ours.

Knows nothing of what lies there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from urllib.parse import unquote

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from app.errors import ManifoldError, SettingsError, UnavailableError

_USER_IN_URL = re.compile(r"://((?:[^/\s:]*:(?!\d+(?:/|$))\S*|[^/\s]*))@")  # a password may hold what it should not


def open_place(url: str, what: str) -> tuple[AbstractFileSystem, str]:
    """The file system and the path in it, without a slash at its end. Does not reach for it yet.

    `what` lies there, in the plural. Credentials and endpoints are what the protocol's own package reads from its
    surroundings. Raises SettingsError.
    """
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:
        raise SettingsError(
            f"{what} at {without_user(url)} need a package that is missing: {without_user(str(error), url)}"
        ) from error
    except Exception as error:  # whatever a protocol's package makes of its URL and its surroundings
        raise SettingsError(f"{without_user(url)} is no place for {what}: {without_user(str(error), url)}") from error
    return fs, root.rstrip("/")


@contextlib.contextmanager
def reaching(what: str, done: str, url: str = "") -> Iterator[None]:
    """The border: each protocol's package has exceptions of its own, and all of them mean the same to us.

    Raises UnavailableError: `what` cannot be `done`. The user in `url` is not told.
    """
    try:
        yield
    except ManifoldError:
        raise
    except Exception as error:
        cause = without_user(str(error), url) or type(error).__name__
        raise UnavailableError(f"{what} cannot be {done}: {cause}") from error


def without_user(text: str, url: str = "") -> str:
    """Of every URL in the text; the user of `url` also where it stands alone, as in a package's name for a bucket."""
    shown = _USER_IN_URL.sub("://…@", text)
    for user in _USER_IN_URL.findall(url):
        password = user.partition(":")[2]
        for secret in filter(None, (user, unquote(user), password, unquote(password))):
            shown = shown.replace(secret, "…")
    return shown
