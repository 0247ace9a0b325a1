"""Which arrangement a task gets: the cheapest in passes whose dev score is within a tolerance of the best.

Knows recipes and their cost; the study fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from app.domain import BackboneSpec, ProblemType, ReadoutKind
from app.learning.prepare import read_frozen
from app.learning.recipe import Recipe
from app.learning.study import Fitted, Study

NUM_VIRTUAL_TOKENS = 16

Report = Callable[[str, float, float, float], None]  # of each candidate: name, passes, dev score, seconds


class Arrangement(StrEnum):
    """Where a task's row comes from."""

    TRUNK = "trunk"
    LATE = "late"  # an own prefix from half, or two thirds, of the layers on
    FULL = "full"  # an own prefix from the first layer on
    COMBINATION = "combination"  # of prefixes that others trained


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    recipe: Recipe  # completed
    passes: float  # of a request for this task beside others that read the bare trunk


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate on the curve of quality against cost."""

    name: str
    passes: float
    dev: float
    seconds: float
    chosen: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    fitted: Fitted
    candidate: Candidate
    points: tuple[Point, ...]


def passes_of(recipe: Recipe, spec: BackboneSpec) -> float:
    """What a request for this task costs beside tasks on the bare trunk, in passes."""
    forks = [prefix.first_layer for prefix in read_frozen(recipe, spec).prefixes]
    if recipe.num_virtual_tokens:
        forks = [recipe.first_layer]
    if not forks:
        return 1.0
    return 1.0 + (recipe.read_layers[-1] - min(forks)) / spec.num_layers


def candidates(
    base: Recipe, study: Study, arrangements: Sequence[Arrangement], pool: Sequence[Path]
) -> list[Candidate]:
    """From the cheapest up. `pool`: artifacts whose prefixes may be combined."""
    spec = study.backbone.spec
    found: list[Candidate] = []
    for name, recipe in _recipes(base, study, arrangements, pool):
        completed = study.completed(recipe)
        found.append(Candidate(name, completed, passes_of(completed, spec)))
    return sorted(found, key=lambda candidate: candidate.passes)


def _recipes(
    base: Recipe, study: Study, arrangements: Sequence[Arrangement], pool: Sequence[Path]
) -> Iterator[tuple[str, Recipe]]:
    top = study.backbone.spec.num_layers
    is_token = study.tables.problem_type is ProblemType.TOKEN
    readout = "tokens" if is_token else "attention"
    if Arrangement.TRUNK in arrangements:
        if not is_token:
            mean = replace(base, readout=ReadoutKind.MEAN, hidden=0, learning_rate=5 * base.learning_rate)
            yield "bare trunk, mean, linear", mean
        yield f"bare trunk, {readout}", base
        yield f"bare trunk, {readout} of all layers", replace(base, read_layers=tuple(range(1, top + 1)))
    if Arrangement.LATE in arrangements:
        for first_layer in sorted({2 * top // 3, top // 2}, reverse=True):
            yield f"own prefix from layer {first_layer}, {readout}", _own_prefix(base, first_layer)
    if Arrangement.COMBINATION in arrangements and pool:
        yield f"{len(pool)} prefixes combined, {readout}", replace(base, prefixes=tuple(pool))
    if Arrangement.FULL in arrangements:
        yield f"own prefix from layer 0, {readout}", _own_prefix(base, 0)


def _own_prefix(base: Recipe, first_layer: int) -> Recipe:
    return replace(base, num_virtual_tokens=NUM_VIRTUAL_TOKENS, first_layer=first_layer)


def refinements(chosen: Candidate) -> Iterator[tuple[str, Recipe]]:
    """Other rates and sizes of one arrangement, one change at a time."""
    recipe = chosen.recipe
    for factor in (1 / 3, 3):
        yield f"{chosen.name}, rate × {factor:.2g}", replace(recipe, learning_rate=recipe.learning_rate * factor)
    if recipe.hidden:
        yield f"{chosen.name}, dropout 0.1", replace(recipe, dropout=0.1)
    if recipe.num_virtual_tokens:
        rate = recipe.prefix_learning_rate
        yield f"{chosen.name}, prefix rate × 3", replace(recipe, prefix_learning_rate=3 * rate)
        more = 2 * recipe.num_virtual_tokens
        yield f"{chosen.name}, {more} virtual tokens", replace(recipe, num_virtual_tokens=more)


def search(study: Study, tried: Sequence[Candidate], tolerance: float, report: Report) -> Found:
    """Fit every candidate, and choose."""
    study.prepare(candidate.recipe for candidate in tried)
    return choose(fit_all(study, tried, report), tolerance)


def fit_all(study: Study, tried: Sequence[Candidate], report: Report) -> list[tuple[Candidate, Fitted]]:
    """A user's interrupt ends it behind the first candidate, with those that are there."""
    fits: list[tuple[Candidate, Fitted]] = []
    for candidate in tried:
        try:
            fitted = study.fit(candidate.recipe, lambda *_: None)
        except KeyboardInterrupt:
            if not fits:
                raise
            break
        fits.append((candidate, fitted))
        report(candidate.name, candidate.passes, fitted.best.dev, fitted.seconds)
        if fitted.was_interrupted:
            break
    return fits


def choose(fits: Sequence[tuple[Candidate, Fitted]], tolerance: float) -> Found:
    """The cheapest within `tolerance` of the best dev score; of equal cost the better."""
    best = max(fitted.best.dev for _, fitted in fits)
    near = [(candidate, fitted) for candidate, fitted in fits if fitted.best.dev >= best - tolerance]
    cheapest = min(candidate.passes for candidate, _ in near)
    chosen, kept = max(((c, f) for c, f in near if c.passes <= cheapest + 1e-9), key=lambda pair: pair[1].best.dev)
    points = tuple(Point(c.name, c.passes, f.best.dev, f.seconds, c is chosen) for c, f in fits)
    return Found(kept, chosen, points)
