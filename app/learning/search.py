"""Which arrangement a task gets: the cheapest in passes whose dev score is within a tolerance of the best.

Knows recipes and their cost; the study fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from app.domain import BackboneSpec, InputKind, ProblemType
from app.errors import SettingsError
from app.learning.prepare import read_frozen
from app.learning.recipe import Recipe
from app.learning.study import Fitted, Study

NUM_VIRTUAL_TOKENS, PAIR_VIRTUAL_TOKENS = 16, 32  # to compare two texts takes more

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
    was_interrupted: bool = False  # the user ended the search; what is here is the best until then


def passes_of(recipe: Recipe, spec: BackboneSpec) -> float:
    """What a request for this task costs beside tasks on the bare trunk, in passes."""
    forks = [prefix.first_layer for prefix in read_frozen(recipe, spec).prefixes]
    if recipe.num_virtual_tokens:
        forks = [recipe.first_layer]
    if not forks:
        return 1.0
    return 1.0 + (recipe.read_layers[-1] - min(forks)) / spec.num_layers


def candidates(
    base: Recipe,
    study: Study,
    arrangements: Sequence[Arrangement],
    pool: Sequence[Path],
    given: Collection[str] = (),
) -> list[Candidate]:
    """From the cheapest up. `pool`: artifacts whose prefixes may be combined; `given`: choices that must stay."""
    spec = study.backbone.spec
    found: list[Candidate] = []
    for name, recipe in _recipes(base, study, arrangements, pool, given):
        completed = study.completed(recipe)
        found.append(Candidate(name, completed, passes_of(completed, spec)))
    return sorted(found, key=lambda candidate: candidate.passes)


def _recipes(
    base: Recipe,
    study: Study,
    arrangements: Sequence[Arrangement],
    pool: Sequence[Path],
    given: Collection[str],
) -> Iterator[tuple[str, Recipe]]:
    top = study.backbone.spec.num_layers
    is_token, is_pair = study.tables.problem_type is ProblemType.TOKEN, study.tables.train.input_kind is InputKind.PAIR
    readout = study.completed(base).reads.kind
    count = min(PAIR_VIRTUAL_TOKENS if is_pair else NUM_VIRTUAL_TOKENS, study.backbone.spec.max_tokens // 2)
    if Arrangement.TRUNK in arrangements:
        if not is_token and not {"hidden", "num_queries", "num_members"} & set(given):
            rate = base.learning_rate * (1 if "learning_rate" in given else 5)
            yield "bare trunk, mean, linear", base.linear(rate)
        yield f"bare trunk, {readout}", base
        yield f"bare trunk, {readout} of all layers", replace(base, read_layers=tuple(range(1, top + 1)))
    if Arrangement.LATE in arrangements:
        for first_layer in sorted({2 * top // 3, top // 2}, reverse=True):
            yield f"own prefix from layer {first_layer}, {readout}", _own_prefix(base, first_layer, count)
    if Arrangement.COMBINATION in arrangements and pool:
        yield f"{len(pool)} prefixes combined, {readout}", replace(base, prefixes=tuple(pool))
    if Arrangement.FULL in arrangements:
        yield f"own prefix from layer 0, {readout}", _own_prefix(base, 0, count)


def _own_prefix(base: Recipe, first_layer: int, count: int) -> Recipe:
    return replace(base, num_virtual_tokens=count, first_layer=first_layer)


def refinements(chosen: Candidate, study: Study, given: Collection[str] = ()) -> Iterator[tuple[str, Recipe]]:
    """Other rates, sizes and weights of one arrangement, one change at a time; what was given stays."""
    recipe = chosen.recipe
    changes: list[tuple[str, str, Any]] = [
        ("rate ÷ 3", "learning_rate", recipe.learning_rate / 3),
        ("rate × 3", "learning_rate", recipe.learning_rate * 3),
    ]
    if recipe.hidden:
        changes.append(("dropout 0.1", "dropout", 0.1))
    if recipe.reads.kind.has_queries and recipe.num_queries:
        more = 2 * recipe.num_queries
        changes.append((f"{more} queries a layer", "num_queries", more))
    if study.tables.problem_type is ProblemType.MULTI_LABEL:  # a mean over labels, which the loss is not
        changes.append(("rare labels count more", "class_weight_power", 0.5))
    if recipe.num_virtual_tokens:
        more = 2 * recipe.num_virtual_tokens
        changes.append(("prefix rate ÷ 3", "prefix_learning_rate", recipe.prefix_learning_rate / 3))
        if more <= study.backbone.spec.max_tokens // 2:
            changes.append((f"{more} virtual tokens", "num_virtual_tokens", more))
    for told, name, value in changes:
        if name not in given:
            yield f"{chosen.name}, {told}", replace(recipe, **{name: value})


def search(study: Study, tried: Sequence[Candidate], tolerance: float, report: Report) -> Found:
    """Fit every candidate, and choose."""
    if not tried:
        raise SettingsError("there is nothing to choose from: name prefixes with --pool, or other --candidates")
    study.prepare(candidate.recipe for candidate in tried)
    fits = Fits()
    fits.add(study, tried, report)
    return choose(fits, tolerance)


class Fits(list[tuple[Candidate, Fitted]]):
    """Candidates and how they did. A user's interrupt ends the adding and leaves what is there."""

    was_interrupted = False
    _last: Recipe | None = None  # its states are there still

    def add(self, study: Study, tried: Sequence[Candidate], report: Report) -> None:
        """Raises KeyboardInterrupt where it comes before anything is there."""
        for index, candidate in enumerate(tried):
            if self.was_interrupted:
                return
            try:
                if self._last is not None:
                    study.forget(self._last, but=[later.recipe for later in tried[index:]])
                self._last = candidate.recipe
                fitted = study.fit(candidate.recipe, lambda *_: None)
                self.append((candidate, fitted))
                self.was_interrupted = fitted.was_interrupted
                report(candidate.name, candidate.passes, fitted.best.dev, fitted.seconds)
            except KeyboardInterrupt:
                if not self:
                    raise
                self.was_interrupted = True


def choose(fits: Fits, tolerance: float) -> Found:
    """The cheapest within `tolerance` of the best dev score; of equal cost the better."""
    best = max(fitted.best.dev for _, fitted in fits)
    near = [(candidate, fitted) for candidate, fitted in fits if fitted.best.dev >= best - tolerance]
    cheapest = min(candidate.passes for candidate, _ in near)
    chosen, kept = max(((c, f) for c, f in near if c.passes <= cheapest + 1e-9), key=lambda pair: pair[1].best.quality)
    points = tuple(Point(c.name, c.passes, f.best.dev, f.seconds, c is chosen) for c, f in fits)
    return Found(kept, chosen, points, fits.was_interrupted)
