"""The bare limit: transformers' own encoder over tokenized texts in batches, in a process of its own, with no server.

Reads one JSON object a line from standard input and answers each with one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from app.engine.backbone import set_threads
from app.engine.host_memory import keep_freed_memory
from tests.bench.limits_torch import forward, load_network
from tests.bench.lines import ask
from tests.bench.load_texts import MIXED_BLOCK, TextSet

BATCHES = (1, 2, 4, 8, 16, 32, 64)
_TEXTS = 2 * MIXED_BLOCK


@dataclass
class Bare:
    """The process, and the best batch size that was found for each set of texts."""

    process: subprocess.Popen[str]
    best: dict[str, int] = field(default_factory=dict)

    def texts_s(self, name: str, seconds: float) -> float:
        """At the best batch size."""
        return float(self._ask({"texts": name, "batch": self.best[name], "seconds": seconds})["texts_s"])

    def one_ms(self, name: str, seconds: float) -> float:
        """Median of a forward of one text."""
        return float(self._ask({"texts": name, "batch": 1, "seconds": seconds})["median_ms"])

    def find_best(self, texts: TextSet, seconds: float) -> None:
        self._ask({"texts": texts.name, "ids": texts.ids[:_TEXTS]})
        rates = {
            batch: self._ask({"texts": texts.name, "batch": batch, "seconds": seconds})["texts_s"] for batch in BATCHES
        }
        self.best[texts.name] = max(rates, key=rates.__getitem__)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        return ask(self.process, question, "the bare encoder")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def start_bare(model: str, dtype: str, threads: int, environment: dict[str, str]) -> Bare:
    command = [sys.executable, "-m", "tests.bench.serving_bare", model, "--dtype", dtype, "--threads", str(threads)]
    root = Path(__file__).resolve().parents[2]
    return Bare(
        subprocess.Popen(command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    keep_freed_memory()
    set_threads(options.threads)
    network = load_network(options.model, options.dtype)
    known: dict[str, list[list[int]]] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "ids" in question:
            known[question["texts"]] = sorted(question["ids"], key=len)
            answer = {}
        else:
            answer = _measure(network, known[question["texts"]], question["batch"], question["seconds"])
        print(json.dumps(answer), flush=True)


def _measure(network: nn.Module, ids: list[list[int]], batch: int, seconds: float) -> dict[str, float]:
    """Batches of neighbours in length, each padded to its longest, over and over until `seconds` are used up."""
    batches = [ids[start : start + batch] for start in range(0, len(ids) - batch + 1, batch)]
    if len(ids[0]) == len(ids[-1]):
        batches = batches[:1]
    forwards = [forward(network, texts) for texts in batches]
    forwards[0]()
    times: list[float] = []
    while sum(times) < seconds:  # whole sweeps only: each has every length
        for run in forwards:
            began_s = time.perf_counter()
            run()
            times.append(time.perf_counter() - began_s)
    return {"texts_s": batch * len(times) / sum(times), "median_ms": 1000 * statistics.median(times)}


if __name__ == "__main__":
    main()
