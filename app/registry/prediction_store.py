"""Where the prediction log lies: parts are finished, the oldest go, and the rows of one request are found again.

Parts are written as JSON lines on local disk: in the log's own folder, or in the home folder where the log lies behind
a URL. An object store cannot be appended to and a Parquet file is read only once it is closed, so a part gets its last
form, and is uploaded, when it is finished: under its last name, in one step. Knows nothing of what rows say.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, cast

from fsspec.implementations.local import LocalFileSystem

from app.errors import SettingsError, UnavailableError
from app.registry.durable import sync, write_durably
from app.registry.places import open_place, reaching, without_user
from app.registry.prediction_conversion import Converter
from app.registry.prediction_lines import Row, find_lines, time_of
from app.registry.prediction_parts import PartName, create_locked, left_alone

logger = logging.getLogger(__name__)

_WAITING_BYTES = 1_000_000_000  # of parts that wait for a store that does not take them
_SEARCHED_BYTES = 4_000_000_000
_SEARCH_S = 20.0  # no file is begun after it
_SLACK_S = 120.0  # rows wait before they are written, and clocks differ
_FAILURES = 3  # in one go: then it is the store
_STUCK_S = 300.0
_MOST_WAITING = 5  # parts, with the one that is written; then rows are made in the time of those who answer
# Arrow's own are some of these.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)
_TRIM_EVERY_S = 600.0  # files grow old though nothing is written
_LOOKS = 3  # parts are finished while they are looked for


@dataclass(frozen=True, slots=True)
class _File:
    name: PartName
    path: str
    size_bytes: int
    is_here: bool  # on this machine's disk


@dataclass(slots=True)
class Found:
    """Rows of one request, and what was searched for them."""

    rows: list[Row] = field(default_factory=list)
    files: int = 0
    size_bytes: int = 0
    oldest_s: float | None = None  # when the oldest part that was searched began
    damaged: list[str] = field(default_factory=list)  # files that cannot be read: broken, or not for this server
    stopped_s: float | None = None  # where the search was given up: not all that is older was searched


class PredictionStore:
    """One thread calls `tidy`, `drop_waiting` and `close`; everything else is safe from any thread."""

    def __init__(
        self,
        url: str,
        home: Path,
        kind: Literal["jsonl", "parquet"],
        limit_bytes: int,
        limit_s: float = math.inf,
    ) -> None:
        """`limit_bytes` and `limit_s`: of this server's files, how large together and how long each is kept.

        Raises SettingsError where the log cannot be written.
        """
        self.url, self._secret_url = without_user(url), url
        self._fs, self._root = open_place(url, "predictions")
        self._kind, self._limit_bytes, self._limit_s = kind, limit_bytes, limit_s
        self._converter = Converter(kind)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        waiting = home / "prediction-log"
        self.folder = Path(self._root) if self._is_local else waiting  # where parts are written
        self._trim_at_s = -math.inf  # on time.monotonic()
        self._failed_s: dict[tuple[str, str], float] = {}  # when a part could not be finished, by its key
        self._stuck: set[tuple[str, str]] = set()  # parts that could not be finished where others could
        try:
            self.server = _server_name(waiting / "server")
            _check_folder(self.folder)
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from error
        if not self._is_local:
            self._check_store()

    # -- keeping -------------------------------------------------------------------------------------------------------

    def tidy(self, left_s: Callable[[], float] = lambda: math.inf) -> None:
        """Finishes parts that nobody writes any more, also those of a process that was killed; the oldest go.

        `left_s`: how long this may take still, where the server stops. One part that cannot be finished holds up no
        other, and is told of once. Raises UnavailableError where none can.
        """
        self._converter.rest()
        num_finished, failed = 0, list[tuple[_File, UnavailableError]]()
        for file in self._due():
            if left_s() <= 0:
                break
            try:
                with self._reaching("written"):
                    num_finished += self._finish(file, left_s)
            except UnavailableError as error:
                self._failed_s[file.name.key] = time.monotonic()
                failed.append((file, error))
                if len(failed) == _FAILURES:
                    break
        told = [(file, error) for file, error in failed if file.name.key not in self._stuck]
        if told and not num_finished:
            with contextlib.suppress(UnavailableError):  # a full disk: what goes may make room
                self._trim()
            raise told[0][1]
        for file, cause in told:
            self._stuck.add(file.name.key)
            logger.error("%s waits, and others of the prediction log do not: %s", file.path, cause)
        if num_finished or time.monotonic() >= self._trim_at_s:
            self._trim()
            self._trim_at_s = time.monotonic() + _TRIM_EVERY_S

    def close(self) -> None:
        """Ends the process that makes rows."""
        self._converter.close()

    def _due(self) -> list[_File]:
        """Those that failed come last; one that fails where others do not is tried now and then."""
        waiting = self._waiting()
        keys = {file.name.key for file in waiting}
        self._failed_s = {key: failed_s for key, failed_s in self._failed_s.items() if key in keys}
        self._stuck &= keys
        latest_s = time.monotonic() - _STUCK_S
        due = [file for file in waiting if file.name.key not in self._stuck or self._failed_s[file.name.key] < latest_s]
        return sorted(due, key=lambda file: self._failed_s.get(file.name.key, 0.0))

    def _waiting(self) -> list[_File]:
        """This server's parts that are not finished, oldest first."""
        files = [file for file in self._here() if file.name.ended_s is None and file.name.server == self.server]
        return sorted(files, key=lambda file: file.name.began_s)

    def _finish(self, file: _File, left_s: Callable[[], float]) -> bool:
        path = Path(file.path)
        with left_alone(path) as part:
            if part is None:
                return False
            name = str(replace(file.name, ended_s=path.stat().st_mtime, kind=self._kind))
            self._sweep(file.name)
            converted = path.with_name(f".{name}.partial")
            try:
                if not self._converter.convert(part, converted, partial(self._is_pressing, left_s), left_s):
                    return False
                converted.chmod(path.stat().st_mode & 0o777)
                self._put(converted, name)
            finally:
                converted.unlink(missing_ok=True)
            path.unlink()
            return True

    def _sweep(self, name: PartName) -> None:
        """What a killed server's attempt at this part left."""
        for path in self.folder.glob(f".*_{name.server}_{name.chance}.*.partial"):
            path.unlink(missing_ok=True)

    def _is_pressing(self, left_s: Callable[[], float]) -> bool:
        return left_s() < math.inf or len(self._waiting()) > _MOST_WAITING

    def _put(self, path: Path, name: str) -> None:
        """The file is gone from where it was."""
        if self._is_local:
            path.rename(Path(self._root) / name)
            sync(Path(self._root))
        else:
            self._fs.put_file(str(path), f"{self._root}/{name}")
            path.unlink()

    def _trim(self) -> None:
        with self._reaching("kept within its limit"):
            own = [file for file in self._stored() if file.name.server == self.server]
            excess_bytes = sum(file.size_bytes for file in own) - self._limit_bytes
            finished = (file for file in own if file.name.ended_s is not None)
            for file in sorted(finished, key=lambda file: file.name.began_s):
                if excess_bytes <= 0 and not self._is_old(_ended_s(file.name)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(file.path)
                excess_bytes -= file.size_bytes

    def drop_waiting(self) -> int:
        """Parts that could not be finished, once they are too much or too old. How many rows that was.

        Raises OSError.
        """
        waiting, lost = self._waiting(), 0
        excess_bytes = sum(file.size_bytes for file in waiting) - min(_WAITING_BYTES, self._limit_bytes)
        for file in waiting:
            if excess_bytes <= 0 and not self._is_old(Path(file.path).stat().st_mtime):
                continue
            with left_alone(Path(file.path)) as part:
                if part is not None:
                    lost += _count_rows(Path(file.path))
                    Path(file.path).unlink()
            excess_bytes -= file.size_bytes
        return lost

    def _is_old(self, ended_s: float) -> bool:
        return ended_s < time.time() - self._limit_s

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self, request_id: str, since_s: float = 0.0, until_s: float = float("inf")) -> Found:
        """Rows of a request that was answered in this time, newest parts first. Bounded in bytes and in time.

        What is found ends no search: callers choose the ids, so an older answer may have the same. Raises
        UnavailableError.
        """
        found, searched = Found(), set[tuple[str, str]]()
        deadline_s = time.monotonic() + _SEARCH_S
        with self._reaching("read"):
            for _ in range(_LOOKS):
                files = [file for file in self._files() if file.name.key not in searched]
                if self._search(files, request_id, since_s, until_s, deadline_s, found, searched):
                    break
        found.rows.sort(key=lambda row: (str(row.get("time")), row.get("input", 0)))
        return found

    def _search(
        self,
        files: list[_File],
        request_id: str,
        since_s: float,
        until_s: float,
        deadline_s: float,
        found: Found,
        searched: set[tuple[str, str]],
    ) -> bool:
        """False where one of the files is not there any more: it was finished, or was the oldest.

        Files that overlap `until_s`, which may be where an earlier search was given up, are all searched and one
        behind them, whatever it takes: so each search comes further than the one before.
        """
        is_complete, is_further = True, False
        wanted = [file for file in files if _overlaps(file.name, since_s, until_s)]
        for file in sorted(wanted, key=lambda file: (_ended_s(file.name), file.name.began_s), reverse=True):
            is_much = found.size_bytes + file.size_bytes > _SEARCHED_BYTES or time.monotonic() > deadline_s
            if is_much and is_further:
                found.stopped_s = min(math.ceil(file.name.ended_s or time.time()), until_s)
                break
            try:
                rows = self._read(file, request_id)
            except FileNotFoundError:
                is_complete = False
                continue
            except (ConnectionError, TimeoutError):  # of the place, not of this file
                raise
            except _UNREADABLE as error:
                told = without_user(str(error), self._secret_url)
                logger.warning("%s of the prediction log cannot be read: %s", file.name, told)
                found.damaged.append(str(file.name))
                rows = []
            searched.add(file.name.key)
            is_further |= math.isinf(until_s) or _ended_s(file.name) <= until_s - 1  # stops are whole seconds
            found.files, found.size_bytes = found.files + 1, found.size_bytes + file.size_bytes
            found.oldest_s = min(found.oldest_s or file.name.began_s, file.name.began_s)
            found.rows += [row for row in rows if _is_within(row, since_s, until_s)]
        return is_complete

    def _read(self, file: _File, request_id: str) -> list[Row]:
        """Raises one of _UNREADABLE where the file is damaged, or not for us."""
        with self._opened(file) as content:
            find = find_lines if file.name.kind == "jsonl" else _parquet().find_in_parquet
            return find(content, request_id)

    def _opened(self, file: _File) -> BinaryIO:
        return Path(file.path).open("rb") if file.is_here else cast(BinaryIO, self._fs.open(file.path, "rb"))

    # -- what lies where -----------------------------------------------------------------------------------------------

    def _files(self) -> list[_File]:
        """Every server's; a part that is being finished once."""
        here = [] if self._is_local else list(self._here())  # first: a part may be uploaded meanwhile
        stored = list(self._stored())
        finished = {file.name.key for file in stored if file.name.ended_s is not None}
        others = [*(file for file in stored if file.name.ended_s is None), *here]
        done = [file for file in stored if file.name.ended_s is not None]
        return done + [file for file in others if file.name.key not in finished]

    def _stored(self) -> Iterator[_File]:
        if self._is_local:
            yield from self._here()
            return
        self._fs.invalidate_cache(self._root)
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:  # an object store has a folder once something is in it
            return
        for entry in entries:
            name = PartName.parse(entry["name"].rpartition("/")[2])
            if name is not None:
                yield _File(name, entry["name"], entry["size"] or 0, False)

    def _here(self) -> Iterator[_File]:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            name = PartName.parse(path.name)
            if name is not None:
                with contextlib.suppress(FileNotFoundError):
                    yield _File(name, str(path), path.stat().st_size, True)

    # -- borders -------------------------------------------------------------------------------------------------------

    def _check_store(self) -> None:
        """With a file that says nothing, and does not stay where it may be removed."""
        path = f"{self._root}/.{self.server}"
        try:
            with self._reaching("written"):
                self._fs.pipe_file(path, b"")
        except UnavailableError as error:
            raise self._refused(str(error.__cause__ or error)) from error
        with contextlib.suppress(Exception):
            self._fs.rm_file(path)

    def _reaching(self, done: str) -> AbstractContextManager[None]:
        return reaching(f"the prediction log {self.url}", done, self._secret_url)

    def _refused(self, cause: str) -> SettingsError:
        told = without_user(cause, self._secret_url)
        return SettingsError(
            f"the prediction log {self.url} cannot be written: {told}; give the server a place that it may write, or "
            "leave prediction_log out"
        )


def _server_name(path: Path) -> str:
    """Of this home folder, the same at every start: the host's, and chance. Raises OSError."""
    for _ in range(2):
        if path.is_file() and (name := path.read_text("utf-8").strip()):
            return name
        host = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:60]
        write_durably(path, f"{host}-{secrets.token_hex(4)}\n".encode())  # another process may be as far: read again
    raise OSError(f"{path} does not keep what is written")


def _check_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{secrets.token_hex(8)}.partial"
    os.close(create_locked(probe, 0o600))
    probe.unlink()


def _parquet() -> ModuleType:
    """Arrow takes 40 MB, which a server whose log has no Parquet need not have."""
    return import_module("app.registry.prediction_parquet")


def _overlaps(name: PartName, since_s: float, until_s: float) -> bool:
    return name.began_s - _SLACK_S <= until_s and _ended_s(name) + _SLACK_S >= since_s


def _ended_s(name: PartName) -> float:
    return float("inf") if name.ended_s is None else name.ended_s


def _is_within(row: Row, since_s: float, until_s: float) -> bool:
    """A row whose time is damaged stays: nothing says that it is not meant."""
    at_s = time_of(row)
    return at_s is None or since_s <= at_s <= until_s


def _count_rows(path: Path) -> int:
    """Each says once what was asked for. A caller's text cannot hold this: its quotes are escaped."""
    with path.open("rb") as file:
        return sum(line.count(b'"reference":"') for line in file)
