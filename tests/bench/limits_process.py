"""Subjects of the limits benchmark, each in a process of its own, with a line of JSON for each question and its answer.

In one process they would keep each other's helpers from waiting awake: OpenMP looks at all threads of a process, see
`app.engine.backbone.apart`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.limits_cases import Case
from tests.bench.limits_torch import (
    COMPILED,
    DIRECT,
    EAGER,
    FROZEN,
    INT8,
    SUBMITTED,
    Local,
    compiled,
    dynamic_int8,
    eager,
    engine_subject,
)
from tests.bench.lines import ask

_ROOT = Path(__file__).resolve().parents[2]
_MAKE: dict[str, Callable[[str, str], Local]] = {
    EAGER: eager,
    COMPILED: compiled,
    FROZEN: lambda path, dtype: compiled(path, dtype, is_frozen=True),
    DIRECT: lambda path, dtype: engine_subject(path, dtype, is_submitted=False),
    SUBMITTED: lambda path, dtype: engine_subject(path, dtype, is_submitted=True),
    INT8: lambda path, _: dynamic_int8(path),
}


@dataclass
class Outside:
    """A subject in another process. `settle` before `turn_s`."""

    name: str
    dtype: str
    process: subprocess.Popen[str]
    states: dict[str, list[float]] = field(default_factory=dict)  # by case: of the first token of the shortest text

    def settle(self, case: Case) -> int:
        """Choose the fastest batch size and warm up; returns the size."""
        answer = self._ask({"case": case.name, "texts": case.texts, "batch_sizes": case.batch_sizes})
        self.states[case.name] = answer.get("state", [])
        return int(answer["batch"])

    def turn_s(self, case: Case, seconds: float) -> float:
        """Median seconds of the runs in one turn."""
        return float(self._ask({"case": case.name, "turn_s": seconds})["seconds"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return ask(self.process, question, self.name)


@contextmanager
def beside(name: str, dtype: str, command: Sequence[str]) -> Iterator[Outside]:
    """The process ends with the block."""
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Outside(name, dtype, process)


@contextmanager
def torch_subject(name: str, path: str, dtype: str, threads: int) -> Iterator[Outside]:
    command = [sys.executable, "-m", "tests.bench.limits_process", name, path, dtype, "--threads", str(threads)]
    with beside(name, "int8" if name == INT8 else dtype, command) as subject:
        yield subject


def main() -> None:
    from app.engine.backbone import set_threads
    from app.engine.host_memory import keep_freed_memory

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(_MAKE))
    parser.add_argument("path")
    parser.add_argument("dtype")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(options.threads)
    subject = _MAKE[options.name](options.path, options.dtype)
    cases: dict[str, Case] = {}
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, float]
        if "texts" in question:
            cases[question["case"]] = Case(question["case"], question["texts"], tuple(question["batch_sizes"]))
            answer = {"batch": subject.settle(cases[question["case"]])}
        else:
            answer = {"seconds": subject.turn_s(cases[question["case"]], question["turn_s"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
