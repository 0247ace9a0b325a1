"""How soon another data set's texts are noticed, and that a data set's own texts are not, for the shipped tasks.

    make bench-drift DATA=folder    # with a folder for each set, holding test.tsv (or test.jsonl)

A real engine in this process answers each text once; streams are drawn from the answers with replacement and go through
the watcher of the server. Writes tests/bench/DRIFT.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from app.config import SHIPPED_PREFIXES, Settings
from app.domain import TaskVersion, TextInput
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone, set_threads
from app.engine.engine import Engine
from app.engine.golden import predict
from app.engine.host_memory import keep_freed_memory
from app.engine.plan import token_limit
from app.engine.tokenizer import TextTokenizer
from app.learning.data import read_table
from app.registry.saved_windows import SavedWindows
from app.service.dispatch import Reading
from app.service.drift import DriftWatcher
from app.service.usage import Timings, Usage
from app.service.watching import Served
from app.service.windows import DRIFT_P_VALUE, DRIFT_PSI, Drift
from app.telemetry.metrics import Metrics
from tests.bench.machine import describe
from tests.fakes import make_task, snapshot_of

STREAMS = {  # task → its own data set, and others
    "spam": ("sms_spam", ("goemotions", "banking77")),
    "sentiment": ("goemotions_sentiment", ("sms_spam", "sst2")),
    "emotion": ("goemotions", ("sms_spam", "agnews")),
    "intent": ("clinc150", ("banking77", "goemotions")),
    "banking": ("banking77", ("clinc150", "sms_spam")),
    "offensive": ("davidson_hate", ("sst2", "clinc150")),
    "slots": ("snips_slots", ("banking77", "agnews")),
    "entailment": ("snli_small", ("mrpc", "qqp10k")),
}
UNSHIFTED, MOST_SHIFTED = 20_000, 2_000
OWN_TEXTS, OTHER_TEXTS = 1_500, 1_000
STEP = 50  # texts between two looks
SEED = 0
REPORT = Path(__file__).with_name("DRIFT.md")


@dataclass(frozen=True)
class Shift:
    """What was seen of one stream of another set's texts, behind a window full of the task's own."""

    other: str
    first: dict[str, int]  # kind → texts until it was flagged


@dataclass(frozen=True)
class Found:
    task: str
    own: str
    num_texts: int
    num_others: int
    highest: dict[str, float]  # kind → the highest PSI of the unshifted stream
    alarms: int  # looks at the unshifted stream at which something was flagged
    shifts: list[Shift]


class Streams:
    """One task's versions of texts: answered once, then drawn."""

    def __init__(self, task: str, engine: Engine, tokenizer: TextTokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._artifact = read_artifact(SHIPPED_PREFIXES / task, engine.spec)
        engine.load(self._artifact)
        self.version: TaskVersion = self._artifact.version(1)

    def answered(self, texts: Sequence[TextInput]) -> list[Reading]:
        limit = token_limit(self._engine.spec, [self.version])
        encodings = self._tokenizer.encode(texts, [limit] * len(texts), truncate=True)
        outputs = predict(self._engine, self._tokenizer, self._artifact, list(texts))
        return [
            Reading(0, text, (self.version,), (), encoding, {self.version.digest: output})
            for text, encoding, output in zip(texts, encodings, outputs, strict=True)
        ]


class Watched:
    """A server's watcher with one live version."""

    def __init__(self, version: TaskVersion, unknown_id: int | None, size: int, home: Path) -> None:
        self._task = make_task(version)
        snapshot = snapshot_of(self._task)
        self._watcher = DriftWatcher(lambda: snapshot, unknown_id, size, SavedWindows(home / "windows"), Metrics())

    def see(self, readings: Sequence[Reading]) -> Sequence[Drift]:
        self._watcher.take_in(
            [Served("", "", 1, [], [], b"[]", readings, Usage(0, 0, 0.0, 0), Timings(0.0, 0.0, 0.0), 0.0)]
        )
        self._watcher.compare_all()
        (found,) = self._watcher.drift_of(self._task)
        return found.kinds


def drawn(readings: Sequence[Reading], count: int, seed: int) -> Iterator[list[Reading]]:
    """In steps, each text as often as chance has it."""
    order = np.random.default_rng(seed).integers(len(readings), size=count)
    for start in range(0, count, STEP):
        yield [readings[i] for i in order[start : start + STEP]]


def texts_of(data: Path, name: str, count: int) -> list[TextInput]:
    (path,) = (data / name).glob("test.[tj]s*")
    texts = read_table(path).texts
    order = np.random.default_rng(SEED).permutation(len(texts))[:count]
    return [texts[i] for i in order]


def measure(task: str, data: Path, engine: Engine, tokenizer: TextTokenizer, size: int, home: Path) -> Found:
    own_name, others = STREAMS[task]
    streams = Streams(task, engine, tokenizer)
    own = streams.answered(texts_of(data, own_name, OWN_TEXTS))

    def watched() -> Watched:
        return Watched(streams.version, tokenizer.unknown_id, size, home)

    highest, alarms = unshifted(watched(), own)
    shifts, num_others = [], 0
    for name in others:
        texts = streams.answered(texts_of(data, name, OTHER_TEXTS))
        shifts.append(Shift(name, shifted(watched(), own, texts, size)))
        num_others = max(num_others, len(texts))
    return Found(task, own_name, len(own), num_others, highest, alarms, shifts)


def unshifted(watched: Watched, own: Sequence[Reading]) -> tuple[dict[str, float], int]:
    highest: dict[str, float] = {}
    alarms = 0
    for step in drawn(own, UNSHIFTED, SEED + 1):
        drifts = watched.see(step)
        alarms += any(drift.is_drifting for drift in drifts)
        highest |= {d.kind: max(highest.get(d.kind, 0.0), d.psi or 0.0) for d in drifts}
    return highest, alarms


def shifted(watched: Watched, own: Sequence[Reading], other: Sequence[Reading], size: int) -> dict[str, int]:
    for step in drawn(own, size, SEED + 2):
        watched.see(step)
    first: dict[str, int] = {}
    for number, step in enumerate(drawn(other, MOST_SHIFTED, SEED + 3), start=1):
        for drift in watched.see(step):
            if drift.is_drifting:
                first.setdefault(drift.kind, number * STEP)
    return first


# -- the report --------------------------------------------------------------------------------------------------------


def report(found: Sequence[Found], conditions: str, size: int) -> str:
    kinds = ("score", "label", "length", "unknown")
    lines = [
        "# Drift: how soon it is noticed, and that nothing else is",
        "",
        f"{conditions}. Written by `make bench-drift`.",
        "",
        f"A window holds {size:,} texts; it drifts where PSI (less what chance shows) is above {DRIFT_PSI} and the "
        f"p-value below {DRIFT_P_VALUE}. Baselines are those of the shipped manifests, from dev files; the streams are "
        f"drawn, with replacement, from up to {OWN_TEXTS:,} test texts of the task's own set and {OTHER_TEXTS:,} of "
        f"another. Looked at every {STEP} texts.",
        "",
        "## Another data set's texts",
        "",
        f"Behind a window full of the task's own texts; the numbers are how many of the other set's had come when each "
        f"kind was flagged (–: not within {MOST_SHIFTED:,}).",
        "",
        "| task | fed | score | label | length | unknown | first |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        for shift in one.shifts:
            cells = [_count(shift.first.get(kind)) for kind in kinds]
            first = min(shift.first.values(), default=None)
            lines.append(f"| {one.task} | {shift.other} | {' | '.join(cells)} | {_count(first)} |")
    missed = sum(not shift.first for one in found for shift in one.shifts)
    total = sum(len(one.shifts) for one in found)
    lines += [
        "",
        f"Another set's texts are flagged within {MOST_SHIFTED:,} in {total - missed} of {total} streams: "
        f"{_verdict(missed)}.",
        "",
        f"## The task's own held-out texts, {UNSHIFTED:,} of them",
        "",
        "The highest PSI of each kind at any look, and at how many looks something was flagged.",
        "",
        "| task | its own set | score | label | length | unknown | looks with a flag |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        cells = [f"{one.highest[kind]:.3f}" if kind in one.highest else "–" for kind in kinds]
        lines.append(f"| {one.task} | {one.own} | {' | '.join(cells)} | {one.alarms} |")
    alarmed = sum(one.alarms > 0 for one in found)
    quiet = f"{len(found) - alarmed} of {len(found)} tasks"
    lines += ["", f"A task's own texts are not flagged in {UNSHIFTED:,} for {quiet}: {_verdict(alarmed)}.", ""]
    return "\n".join(lines)


def _verdict(missed: int) -> str:
    return "**not met**" if missed else "met"


def _count(texts: int | None) -> str:
    return "–" if texts is None else f"{texts:,}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.drift")
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", default=",".join(STREAMS))
    args = parser.parse_args()
    keep_freed_memory()
    set_threads(args.threads)
    backbone = Backbone.load("embedded", "cpu", "float32")
    tokenizer, engine = TextTokenizer(backbone.path), Engine(backbone)
    size: int = Settings.model_fields["drift_window"].default
    engine.start()
    found = []
    with tempfile.TemporaryDirectory() as home:
        for task in args.tasks.split(","):
            found.append(measure(task, args.data, engine, tokenizer, size, Path(home)))
            print(found[-1], flush=True)
    engine.close()
    conditions = f"{datetime.now(UTC):%Y-%m-%d}, {describe(args.threads)}"
    REPORT.write_text(report(found, conditions, size))
    print(f"written: {REPORT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
