"""Few labels: a head on what other tasks' prefixes make of the text, with no prefix trained.

Tries the bare trunk, each prefix, all of them, and a subset chosen by greedy forward selection on dev.
After Huang et al. 2023 (arXiv 2305.13499).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from app.domain import BackboneSpec
from app.engine.artifact import read_artifact
from app.engine.folder import list_artifacts
from app.errors import ManifoldError, SettingsError
from app.learning.recipe import Recipe
from app.learning.search import Candidate, Fits, Found, Report, choose, passes_of
from app.learning.study import Study


def usable(folder: Path, spec: BackboneSpec, without: str = "") -> list[Path]:
    """The artifacts in `folder` with a prefix of this backbone, each prefix once, but those of the task `without`."""
    found: dict[str, Path] = {}
    for place in list_artifacts(folder):
        try:
            artifact = read_artifact(place.path, spec)
        except ManifoldError:  # of another backbone, or no artifact: not for this task
            continue
        prefixes = artifact.manifest["prefixes"]
        if len(prefixes) == 1 and artifact.manifest["task"] != without:
            found.setdefault(prefixes[0]["digest"], place.path)
    return list(found.values())


def compose(study: Study, base: Recipe, pool: Sequence[Path], tolerance: float, report: Report) -> Found:
    """The cheapest within `tolerance` of the best. Raises SettingsError where the pool is empty."""
    if not pool:
        raise SettingsError("there are no prefixes of this backbone to compose: name some with --pool")
    fits = Fits()
    _fit(fits, study, base, [(), *((path,) for path in pool)], report)
    if len(pool) > 1:
        _fit(fits, study, base, [tuple(pool)], report)
        _grow(fits, study, base, list(pool), report)
    return choose(fits, tolerance)


def _grow(fits: Fits, study: Study, base: Recipe, pool: list[Path], report: Report) -> None:
    """Start from the best single prefix; add the one that helps dev most, until none does."""
    singles = [pair for pair in fits if len(pair[0].recipe.prefixes) == 1]
    candidate, fitted = max(singles, key=lambda pair: pair[1].best.dev)
    chosen, best = candidate.recipe.prefixes, fitted.best.dev
    while len(chosen) + 1 < len(pool):
        before = len(fits)
        _fit(fits, study, base, [(*chosen, path) for path in pool if path not in chosen], report)
        if fits.was_interrupted or before == len(fits):
            return
        candidate, fitted = max(fits[before:], key=lambda pair: pair[1].best.dev)
        if fitted.best.dev <= best:
            return
        chosen, best = candidate.recipe.prefixes, fitted.best.dev


def _fit(fits: Fits, study: Study, base: Recipe, tuples: Sequence[tuple[Path, ...]], report: Report) -> None:
    tried = []
    for paths in tuples:
        recipe = study.completed(replace(base, prefixes=paths))
        tried.append(Candidate(_name(paths), recipe, passes_of(recipe, study.backbone.spec)))
    fits.add(study, tried, report)


def _name(paths: Sequence[Path]) -> str:
    return " + ".join(path.name for path in paths) or "bare trunk"
