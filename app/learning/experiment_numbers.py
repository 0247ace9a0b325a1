"""The numbers of an experiment's page, and how they are told. Knows neither the page nor how they came about.

A claim counts as decided where the mean over seeds of its difference is larger than the differences' standard
deviation, and than a tenth of a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from app.learning.experiment_plan import (
    ALL,
    CEILING,
    COMBINATION,
    LINEAR,
    OWN,
    READOUTS,
    Cell,
    Outcome,
    Part,
    Plan,
    alone,
)
from app.learning.study import Tables

BEST_SINGLE = "best single prefix"  # for each target, number of examples and seed the one that dev picks
Values = list[float]  # one a seed
_LEAST_DIFFERENCE = 0.001  # a tenth of a point


@dataclass(frozen=True, slots=True, eq=False)
class Story:
    plan: Plan
    found: Mapping[Cell, Outcome]
    tables: Mapping[str, Tables]
    shared_texts: Mapping[str, int]  # target → test texts that a source is trained on
    command: str
    machine: str  # in words
    model: str

    def source_scores(self, source: str, name: str, readout: str) -> Values:
        cells = (Cell(Part.SOURCE, seed, source, name, readout) for seed in self.plan.seeds)
        return [self.found[cell].score for cell in cells]

    def scores(self, target: str, name: str, readout: str, examples: int) -> Values:
        if name == CEILING:
            readout = ""
        if name == BEST_SINGLE:
            return [self._best_single(seed, target, readout, examples).score for seed in self.plan.seeds]
        return [self.found[Cell(Part.TARGET, s, target, name, readout, examples)].score for s in self.plan.seeds]

    def _best_single(self, seed: int, target: str, readout: str, examples: int) -> Outcome:
        names = map(alone, self.plan.sources)
        singles = [self.found[Cell(Part.TARGET, seed, target, name, readout, examples)] for name in names]
        return max(singles, key=lambda outcome: outcome.dev)

    def average(self, name: str, readout: str, examples: int) -> Values:
        """The mean over targets, for each seed."""
        each = [self.scores(target, name, readout, examples) for target in self.plan.targets]
        return [mean(values) for values in zip(*each, strict=True)]

    def cost(self, name: str, figure: Callable[[Outcome], float]) -> float:
        """Of one training, the mean over seeds."""
        source = self.plan.sources[-1]
        return mean(figure(self.found[_training_cell(name, seed, source)]) for seed in self.plan.seeds)

    def head_seconds(self, name: str) -> float:
        """Of the heads of all targets, both readouts, at the largest size; with the states that they read."""
        plan, size = self.plan, self.plan.sizes[-1]
        return mean(
            sum(self.found[Cell(Part.TARGET, s, t, name, r, size)].seconds for t in plan.targets for r in READOUTS)
            for s in plan.seeds
        )

    def difference(self, one: tuple[str, str], other: tuple[str, str], size: int) -> Values:
        """Of two (representation, readout), seed by seed."""
        pairs = zip(self.average(*one, size), self.average(*other, size), strict=True)
        return [a - b for a, b in pairs]


def _training_cell(name: str, seed: int, last: str) -> Cell:
    """What it takes to take in the last source: a prefix of its own, or all trained again."""
    if name == COMBINATION:
        return Cell(Part.SOURCE, seed, last, OWN, LINEAR)
    return Cell(Part.TRAINING, seed, "", name)


# -- words -------------------------------------------------------------------------------------------------------------


def show(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def show_points(values: Sequence[float]) -> str:
    shown = f"{100 * mean(values):+.1f}".replace("-0.0", "+0.0")
    return shown + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def show_size(examples: int) -> str:
    return "all examples" if examples == ALL else f"{examples} examples"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(differences: Sequence[float]) -> str:
    if len(differences) < 2:  # one seed has no spread
        return "open"
    if abs(mean(differences)) < _LEAST_DIFFERENCE:
        return "open: alike"
    if abs(mean(differences)) <= stdev(differences):
        return "open: within the spread"
    return "for" if mean(differences) > 0 else "against"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def heads_of(readout: str) -> str:
    return "linear heads" if readout == LINEAR else "attention readouts"
