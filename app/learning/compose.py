"""Few labels: a head on what other tasks' prefixes make of the text, with no prefix trained.

Tries the bare trunk, each prefix, all of them, and a subset chosen by greedy forward selection on dev.
After Huang et al. 2023 (arXiv 2305.13499).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from app.domain import BackboneSpec
from app.engine.artifact import read_artifact
from app.errors import ManifoldError, SettingsError
from app.learning.recipe import Recipe
from app.learning.search import Candidate, Found, choose, fit_all, passes_of
from app.learning.study import Fitted, Study

_Fits = list[tuple[Candidate, Fitted]]
Report = Callable[[str, float, float, float], None]


def usable(folder: Path, spec: BackboneSpec) -> list[Path]:
    """The artifacts in `folder` with prefixes of this backbone, each set of prefixes once."""
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []:
        try:
            artifact = read_artifact(path, spec)
        except ManifoldError:  # of another backbone, or no artifact: not for this task
            continue
        digests = tuple(prefix["digest"] for prefix in artifact.manifest["prefixes"])
        if len(digests) == 1:
            found.setdefault(digests, path)
    return list(found.values())


def compose(study: Study, base: Recipe, pool: Sequence[Path], tolerance: float, report: Report) -> Found:
    """The cheapest within `tolerance` of the best. Raises SettingsError where the pool is empty."""
    if not pool:
        raise SettingsError("there are no prefixes of this backbone to compose: name some with --pool")
    fits = _fit(study, base, [(), *((path,) for path in pool)], report)
    if len(pool) > 1:
        fits += _fit(study, base, [tuple(pool)], report)
        fits += _grow(study, base, list(pool), fits, report)
    return choose(fits, tolerance)


def _grow(study: Study, base: Recipe, pool: list[Path], fits: _Fits, report: Report) -> _Fits:
    """Start from the best single prefix; add the one that helps dev most, until none does."""
    singles = [pair for pair in fits if len(pair[0].recipe.prefixes) == 1]
    candidate, fitted = max(singles, key=lambda pair: pair[1].best.dev)
    chosen, best = candidate.recipe.prefixes, fitted.best.dev
    grown: _Fits = []
    while len(chosen) + 1 < len(pool):
        round_fits = _fit(study, base, [(*chosen, path) for path in pool if path not in chosen], report)
        grown += round_fits
        candidate, fitted = max(round_fits, key=lambda pair: pair[1].best.dev)
        if fitted.best.dev <= best:
            break
        chosen, best = candidate.recipe.prefixes, fitted.best.dev
    return grown


def _fit(study: Study, base: Recipe, tuples: Sequence[tuple[Path, ...]], report: Report) -> _Fits:
    tried = []
    for paths in tuples:
        recipe = study.completed(replace(base, prefixes=paths))
        tried.append(Candidate(_name(paths), recipe, passes_of(recipe, study.backbone.spec)))
    return fit_all(study, tried, report)


def _name(paths: Sequence[Path]) -> str:
    return " + ".join(path.name for path in paths) or "bare trunk"
