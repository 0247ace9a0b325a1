"""`python -m tests.fake_server DELAY_S [name value]…`: the real server process around an engine that only waits."""

from __future__ import annotations

import sys

from app import main
from app.config import Settings, load_settings
from app.service.runtime import Runtime
from tests.fakes import FakeEngine, make_runtime


def run(arguments: list[str]) -> int:
    delay_s, options = float(arguments[0]), arguments[1:]

    def open_fake(settings: Settings) -> Runtime:
        return make_runtime(settings, FakeEngine(delay_s=delay_s))

    main.open_runtime = open_fake
    return main.serve(load_settings(dict(zip(options[::2], options[1::2], strict=True))))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
