"""`python -m tests.slow_server FILE DELAY_S serve …`: the real server; the stage that FILE names takes longer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.cli import main
from app.engine import engine, forward
from app.engine.scheduler import Scheduler
from app.engine.tokenizer import TextTokenizer

# What runs in each stage, while its time is taken.
STAGES: dict[str, tuple[Any, str]] = {
    "tokenize": (TextTokenizer, "encode_each"),
    "queue": (Scheduler, "next_batch"),
    "collate": (engine, "lay_out"),
    "forward": (forward, "run_layers"),
    "heads": (forward, "score"),
}


def delay(stage: str, named: Path, delay_s: float) -> None:
    owner, name = STAGES[stage]
    undelayed: Callable[..., Any] = getattr(owner, name)

    def delayed(*arguments: Any, **options: Any) -> Any:
        if named.read_text() == stage:
            time.sleep(delay_s)
        return undelayed(*arguments, **options)

    setattr(owner, name, delayed)


if __name__ == "__main__":
    for each in STAGES:
        delay(each, Path(sys.argv[1]), float(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
