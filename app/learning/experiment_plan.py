"""What the paper's experiment runs: its sets, its settings, every number that it finds, and the file that keeps them.

After Huang et al. 2023 (arXiv 2305.13499). Knows nothing of how a number is found.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from app.domain import ProblemType
from app.errors import SettingsError
from app.learning.finetune import FinetuneSettings
from app.learning.problems import MEASURES

ALL = 0  # as a number of examples
LINEAR, ATTENTION = "linear", "attention"
READOUTS = (LINEAR, ATTENTION)
BARE, OWN, COMBINATION, SHARED = "bare trunk", "own prefix", "combination", "shared prefix"
WHOLE, CEILING = "whole backbone", "full fine-tuning"
TOGETHER = (COMBINATION, SHARED, WHOLE)  # the ways to take in a new source
MEASURED = {"cola": "mcc"}  # where accuracy says little; else MEASURES

LINEAR_RATE = 5e-3  # of a linear head


class Part(StrEnum):
    SOURCE = "source"  # how well a source task is learned
    TRAINING = "training"  # what a representation cost
    TARGET = "target"  # a light head for a target task on a fixed representation


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """The rates were the best of 0.01 to 0.3 on dev of emotion, snli_small and sst2, 2,000 rows each."""

    num_virtual_tokens: int
    epochs: int
    learning_rate: float = 0.1
    head_learning_rate: float = LINEAR_RATE


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. None: all rows."""

    sources: tuple[str, ...]  # in the order in which they arrive; the last is the update's
    targets: tuple[str, ...]
    sizes: tuple[int, ...]  # training examples of a target; ALL last
    seeds: tuple[int, ...] = (0, 1, 2)
    single: PrefixSettings = PrefixSettings(16, 10)  # for sources of single texts
    pair: PrefixSettings = PrefixSettings(32, 20)
    finetuning: FinetuneSettings = FinetuneSettings()
    source_rows: int | None = None
    source_dev_rows: int | None = None
    test_rows: int | None = None
    few_dev_rows: int = 200  # of a target's dev set, but with all its examples
    head_epochs: int = 15
    least_steps: int = 200  # of a head, and of a target's full fine-tuning
    with_ceiling: bool = True  # targets fine-tuned in full, from each number of examples


FULL = Plan(
    sources=("sst2", "snli_small", "qqp10k", "cola", "emotion", "goemotions"),
    targets=("trec", "subj", "mpqa", "mrpc", "rte", "banking77", "agnews", "tweeteval_offensive", "stsb"),
    sizes=(16, 100, ALL),
)
QUICK = Plan(
    sources=("sst2", "snli_small", "emotion"),
    targets=("trec", "mrpc", "tweeteval_offensive"),
    sizes=(16, 100),
    seeds=(0,),
    single=PrefixSettings(16, 4),
    pair=PrefixSettings(32, 6),
    finetuning=FinetuneSettings(epochs=2),
    source_rows=800,
    source_dev_rows=200,
    test_rows=400,
    least_steps=100,
    with_ceiling=False,
)


def wide(source_rows: int) -> Plan:
    """All sets, as the full plan has them, each learned as the quick plan does."""
    quick = replace(QUICK, sources=FULL.sources, targets=FULL.targets, seeds=FULL.seeds, with_ceiling=True)
    return replace(quick, source_rows=source_rows)


@dataclass(frozen=True, slots=True)
class Cell:
    """One number to find; with its seed it is one line of the results."""

    part: Part
    seed: int
    task: str  # a data set; "" for the cost of what is trained on several
    representation: str
    readout: str = ""
    examples: int = ALL


@dataclass(frozen=True, slots=True)
class Outcome:
    score: float  # on test, by the task's measure
    dev: float
    seconds: float
    num_parameters: int = 0  # trained ones
    tokens: int = 0  # through the backbone in training; a part of its layers counts as a part of a token
    figures: Mapping[str, float] = field(default_factory=dict)  # on test


def alone(source: str) -> str:
    """The representation that one source's prefix makes."""
    return f"prefix {source}"


def without_last(representation: str, plan: Plan) -> str:
    """The representation before the last source arrived."""
    return f"{representation} without {plan.sources[-1]}"


def representations(plan: Plan) -> tuple[str, ...]:
    before = (without_last(name, plan) for name in TOGETHER)
    return (BARE, *map(alone, plan.sources), *TOGETHER, *before)


def made_of(representation: str, plan: Plan) -> tuple[str, ...]:
    """The sources in a representation."""
    if representation == BARE:
        return ()
    own = tuple(source for source in plan.sources if representation == alone(source))
    is_before = representation in {without_last(name, plan) for name in TOGETHER}
    return own or (plan.sources[:-1] if is_before else plan.sources)


def cells(plan: Plan) -> Iterator[Cell]:
    """All that a finished run has."""
    for seed in plan.seeds:
        for source in plan.sources:
            for name in (BARE, OWN):
                yield from (Cell(Part.SOURCE, seed, source, name, readout) for readout in READOUTS)
            yield from (Cell(Part.SOURCE, seed, source, name, LINEAR) for name in (SHARED, WHOLE))
            yield Cell(Part.SOURCE, seed, source, CEILING)
        for name in (SHARED, WHOLE):
            yield Cell(Part.TRAINING, seed, "", name)
            yield Cell(Part.TRAINING, seed, "", without_last(name, plan))
        for target in plan.targets:
            for name in representations(plan):
                yield from (Cell(Part.TARGET, seed, target, name, r, size) for size in plan.sizes for r in READOUTS)
            if plan.with_ceiling:
                yield from (Cell(Part.TARGET, seed, target, CEILING, examples=size) for size in plan.sizes)


class Kind(StrEnum):
    """What one step does."""

    SHARED = "training of"
    WHOLE = "fine-tuning of"
    SOURCE = "source"
    TARGETS = "heads for"
    CEILING = "full fine-tuning for"


@dataclass(frozen=True, slots=True)
class Step:
    """Work that finds some of the cells, apart from all other steps but those that it needs."""

    kind: Kind
    seed: int
    name: str  # a source, a target, or what is trained on several
    needs: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.name}, seed {self.seed}"


def steps(plan: Plan) -> Iterator[Step]:
    """All of a run, what others need before them and the longest first."""
    for seed in plan.seeds:
        trained = {}
        for kind, called in ((Kind.SHARED, SHARED), (Kind.WHOLE, WHOLE)):
            for name in (called, without_last(called, plan)):
                trained[name] = Step(kind, seed, name)
        sources = {source: Step(Kind.SOURCE, seed, source) for source in plan.sources}
        first = (*trained.values(), *sources.values())
        yield from first
        yield from (Step(Kind.TARGETS, seed, target, first) for target in plan.targets)
        if plan.with_ceiling:
            yield from (Step(Kind.CEILING, seed, target) for target in plan.targets)


def unfinished(plan: Plan, found: Container[Cell]) -> list[Step]:
    """Steps of whose numbers one is missing, and those that they need: what was trained may not be there any more."""
    missing = {_step_of(cell) for cell in cells(plan) if cell not in found}
    wanted = [step for step in steps(plan) if (step.kind, step.seed, step.name) in missing]
    needed = {step for later in wanted for step in (later, *later.needs)}
    return [step for step in steps(plan) if step in needed]


def _step_of(cell: Cell) -> tuple[Kind, int, str]:
    """Which step finds it."""
    if cell.part is Part.TARGET:
        return Kind.CEILING if cell.representation == CEILING else Kind.TARGETS, cell.seed, cell.task
    for kind, name in ((Kind.SHARED, SHARED), (Kind.WHOLE, WHOLE)):
        if cell.representation.startswith(name):
            return kind, cell.seed, cell.representation
    return Kind.SOURCE, cell.seed, cell.task


def measure_of(task: str, problem_type: ProblemType) -> str:
    return MEASURED.get(task, MEASURES[problem_type])


class Ledger(Protocol):
    """Where finished cells go."""

    @property
    def found(self) -> Mapping[Cell, Outcome]: ...

    def add(self, cell: Cell, outcome: Outcome) -> None: ...


class Results:
    """Finished cells, in memory and as JSON lines. The first line says what they are results of."""

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        """Without `resume` the file begins anew. Raises SettingsError where it holds results of something else."""
        self._path = path
        self.found: dict[Cell, Outcome] = {}
        self.kept: Path | None = None  # where the results are that the file had before
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and not resume:
                self.kept = self._put_aside()
        if resume and path.is_file():
            self._read(header)
        with self._writing():
            self._begin(header)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        with self._writing(), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(_written(cell, outcome)))
        self.found[cell] = outcome

    def _put_aside(self) -> Path | None:
        """Results took hours: they outlive a forgotten --resume. None where the file has none."""
        with self._path.open("rb") as file:
            if len(list(islice(file, 2))) < 2:
                return None
        kept = self._path.with_name(f"{self._path.name}.old")
        os.replace(self._path, kept)
        return kept

    def _begin(self, header: Mapping[str, Any]) -> None:
        """In one step: the file is the old one or holds all that is known, whenever the process ends."""
        draft = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        try:
            with draft.open("x", encoding="utf-8") as file:
                file.writelines(map(_line, (header, *(_written(*pair) for pair in self.found.items()))))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)

    def _read(self, header: Mapping[str, Any]) -> None:
        lines = self._path.read_text("utf-8").splitlines()
        if not lines or _record(lines[0]) != json.loads(json.dumps(header)):
            raise SettingsError(
                f"{self._path} holds results of other settings, data or another model: leave out --resume to begin anew"
            )
        for record in filter(None, map(_record, lines[1:])):
            cell = record["cell"]
            self.found[Cell(**cell | {"part": Part(cell["part"])})] = Outcome(**record["outcome"])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SettingsError(f"{self._path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Told:
    """A ledger whose new cells somebody hears of."""

    kept: Ledger
    tell: Callable[[Cell, Outcome], None]

    @property
    def found(self) -> Mapping[Cell, Outcome]:
        return self.kept.found

    def add(self, cell: Cell, outcome: Outcome) -> None:
        self.kept.add(cell, outcome)
        self.tell(cell, outcome)


def _written(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    return {"cell": asdict(cell), "outcome": asdict(outcome)}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _record(line: str) -> dict[str, Any] | None:
    """None for half a line: the run ended while it was written."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record
