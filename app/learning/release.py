"""A proposed release: new versions of the tasks that pack moves, and what it says of all of them.

Knows what the search found; how a task is learned is `learn`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.domain import InputKind, Prefix, TaskVersion
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.learning import drawing, writer
from app.learning.drawing import Mark
from app.learning.learn import Options, learn
from app.learning.notes import Notes, key_of
from app.learning.pack import Search
from app.learning.pack_fits import made_from
from app.learning.pack_tasks import (
    NEAR,
    TRUNK,
    Limits,
    Member,
    PrefixTuple,
    Source,
    State,
    Task,
    check,
    find_live,
    named,
    prefixes_of,
    read_tasks,
    whole_artifact,
)
from app.learning.recipe import Recipe
from app.learning.study import Quiet, Watcher

RELEASE, READABLE, CURVE = "release.json", "RELEASE.md", "curve.svg"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A task as the release has it."""

    version: TaskVersion
    figures: Mapping[str, float]  # by table
    is_new: bool


def propose(
    members: Sequence[Member],
    live_folder: Path,
    out: Path,
    backbones: tuple[Backbone, Backbone],
    watcher: Watcher,
    limits: Limits | None = None,
    others: Collection[str] = (),
    work: Path | None = None,
) -> dict[str, Any]:
    """Find the cheapest arrangement of these tasks and write a release to `out`: see `release.json`, which is returned.

    `live_folder`: artifacts of the tasks as they are now, read until this returns. `others`: live tasks that are not in
    it and take no part. `backbones`: one to train on, one in float32 to measure with. `work`: a folder for all that is
    fitted on the way, which a second call with it goes on from; None: gone at the end. Raises a ManifoldError;
    whatever happens, `out` is never half written.
    """
    limits = limits or Limits()
    check(members, limits, out, work)
    backbone, exact = backbones
    live = find_live(live_folder, [member.recipe.task for member in members], exact.spec)
    tasks = read_tasks(members, live, exact, watcher, others)
    with writer.new_folder(out) as folder:
        notes = Notes(folder / ".work" if work is None else work)
        search = Search({task.name: task for task in tasks}, backbone, watcher, limits, notes)
        states = search.run()
        outcomes = _Release(search, folder, backbones).write(states[-1][1])
        shutil.rmtree(folder / ".work", ignore_errors=True)
        release = _described(search, states, outcomes)
        (folder / RELEASE).write_text(json.dumps(release, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / READABLE).write_text(readable(release), encoding="utf-8")
        (folder / CURVE).write_text(curve_plot(release), encoding="utf-8")
    return release


# -- the release -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Release:
    """Learns what moves, on all rows: first the prefixes that are shared, then what reads them."""

    search: Search
    folder: Path
    backbones: tuple[Backbone, Backbone]

    def write(self, state: State) -> dict[str, Outcome]:
        sources = dict.fromkeys(s for read in state.values() for s in read if s.prefixes and not s.is_live)
        moving = [name for name, read in state.items() if not self._stays(name, read)]
        self.search.watcher.stage("new versions", len(sources) + len(moving))
        learned = {source: self._learn_own(source) for source in sources}
        return {name: self._outcome(name, read, learned) for name, read in state.items()}

    def _stays(self, name: str, read: PrefixTuple) -> bool:
        """Whether the live version reads just this, and well enough."""
        task = self.search.tasks[name]
        if task.live is None or task.live.version.prefixes != prefixes_of(read):
            return False
        if task.live.version.readout.layers[-1] > task.version(read).readout.layers[-1]:
            return False
        needed = min(task.scores[read], task.scores[task.best] - self.search.limits.tolerance)
        return task.live.dev >= needed - NEAR

    def _outcome(self, name: str, read: PrefixTuple, learned: Mapping[Source, Path]) -> Outcome:
        task = self.search.tasks[name]
        if task.live is not None and self._stays(name, read):
            return Outcome(task.live.version, task.live.figures, is_new=False)
        target = self.folder / name
        recipe = task.recipe_for(read)
        if recipe.num_virtual_tokens:  # its own prefix, with the readout that it was trained under
            made = learned[read[0]]
            self.search.watcher.advance(1)
        else:
            paths = tuple(learned.get(source, source.path) for source in read if source.prefixes)
            made = self._learned(task, replace(recipe, prefixes=paths))
        shutil.copytree(made, target)
        artifact = read_artifact(target, self.search.backbone.spec)
        measured = artifact.manifest["evaluation"]
        figures = {split: measured[split].get(task.measure, 0.0) for split in ("dev", "test") if split in measured}
        return Outcome(artifact.version(0), figures, is_new=True)

    def _learn_own(self, source: Source) -> Path:
        task = self.search.tasks[source.owner]
        return self._learned(task, task.own[source])

    def _learned(self, task: Task, recipe: Recipe) -> Path:
        """The artifact, from an earlier run where that has made it."""
        tolerance, spec = self.search.limits.tolerance, self.search.backbone.spec
        known = made_from(recipe, task.tables, task.tables.named, spec) | {"tolerance": tolerance}
        target = self.search.notes.folder / f"learned-{key_of(recipe, known)}"
        made = whole_artifact(target, spec)
        if made is None or made.manifest["training"]["interrupted"]:
            shutil.rmtree(target, ignore_errors=True)
            earlier = None if task.live is None else task.live.manifest
            options = Options(problem_type=task.member.problem_type, tolerance=tolerance, earlier=earlier)
            manifest = learn(recipe, task.member.files, target, self.backbones, Quiet(), options)
            if manifest["training"]["interrupted"]:
                shutil.rmtree(target)
                raise KeyboardInterrupt
        self.search.watcher.advance(1)
        return target


def _described(search: Search, states: Sequence[tuple[str, State]], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The content of release.json. Scores and the tolerance are shares, not points."""
    state, tolerance, spec = states[-1][1], search.limits.tolerance, search.backbone.spec
    return {
        "backbone": {"name": spec.name, "fingerprint": spec.fingerprint},
        "tolerance": tolerance,
        "max_passes": search.limits.max_passes,
        "fits": search.fitter.count,
        "passes": _both_passes(search, outcomes),
        "tasks": {name: _described_task(search.tasks[name], state[name], out) for name, out in outcomes.items()},
        "groups": _described_groups(state, outcomes),
        "curve": _curve(search, states),
        "lacking": [_described_lack(task, state[task.name], tolerance) for task in search.lacking(state)],
        "worse": [
            name
            for name, outcome in outcomes.items()
            if (live := search.tasks[name].live) and outcome.figures["dev"] < live.figures["dev"] - tolerance - NEAR
        ],
    }


def _both_passes(search: Search, outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, float | None]]:
    """By kind of input, of one request for all that read it: before, of those that are live; None where none is."""
    live = search.plan_passes(task.live.version for name in outcomes if (task := search.tasks[name]).live is not None)
    after = _rounded(search.plan_passes(outcome.version for outcome in outcomes.values()))
    return {kind: {"before": _rounded(live).get(kind), "after": passes} for kind, passes in after.items()}


def _rounded(passes: Mapping[InputKind, float]) -> dict[str, float]:
    return {kind.value: round(number, 4) for kind, number in passes.items()}


def _described_task(task: Task, read: PrefixTuple, outcome: Outcome) -> dict[str, Any]:
    return {
        "is_new": outcome.is_new,
        "digest": outcome.version.digest,
        "reads": named(read),
        "measure": task.measure,
        "before": None if task.live is None else {name: round(f, 5) for name, f in task.live.figures.items()},
        "after": {name: round(f, 5) for name, f in outcome.figures.items()},
        "search": {
            "dev": round(task.scores[read], 5),
            "trunk": round(task.scores[TRUNK], 5),
            "best": round(task.scores[task.best], 5),
            "best_reads": named(task.best),
            "train_rows": len(task.part.train.examples),
            "dev_rows": len(task.part.dev.examples),
        },
    }


def _described_groups(state: Mapping[str, PrefixTuple], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Each tuple with the tasks that read it; live tuples of two tasks may be the same."""
    groups: dict[tuple[Prefix, ...], dict[str, Any]] = {}
    for name, read in state.items():
        if prefixes := outcomes[name].version.prefixes:
            digests = [prefix.digest for prefix in prefixes]
            group = groups.setdefault(prefixes, {"reads": named(read), "prefixes": digests, "tasks": []})
            group["tasks"].append(name)
    return list(groups.values())


def _curve(search: Search, states: Sequence[tuple[str, State]]) -> list[dict[str, Any]]:
    """Average dev score against passes: what is live, the search's states, and each task at its best."""
    points = [(name, search.passes(state), search.average(state)) for name, state in states]
    best = {name: task.best for name, task in search.tasks.items()}
    points.append(("each at its best", search.passes(best), search.average(best)))
    live = [task.live for task in search.tasks.values() if task.live is not None]
    if len(live) == len(search.tasks):
        passes = search.plan_passes(one.version for one in live)
        points.insert(0, ("as it is now", passes, sum(one.dev for one in live) / len(live)))
    return [{"state": name, "passes": _rounded(passes), "dev": round(dev, 5)} for name, passes, dev in points]


def _described_lack(task: Task, read: PrefixTuple, tolerance: float) -> dict[str, Any]:
    return {
        "task": task.name,
        "dev": round(task.scores[read], 5),
        "best": round(task.scores[task.best], 5),
        "best_reads": named(task.best),
        "short_by": round(task.shortfall(read, tolerance), 5),
    }


# -- for people --------------------------------------------------------------------------------------------------------


def readable(release: Mapping[str, Any]) -> str:
    """RELEASE.md of release.json."""
    parts = [
        "# Proposed release",
        *cost(release),
        markdown(task_rows(release)),
        "dev and test are of the whole files, before → after; search is the dev score on the rows of the search, and "
        "that of the best arrangement found.",
        "## Score against passes",
        f"![Average dev score against passes]({CURVE})",
        markdown(curve_rows(release)),
        *conclusions(release),
    ]
    return "\n\n".join(parts) + "\n"


def cost(release: Mapping[str, Any]) -> list[str]:
    """In sentences. A text and a pair never stand in one request."""
    by_kind, limit = release["passes"], f"at most {release['max_passes']:g}"
    if len(by_kind) == 1:
        return [f"Passes for all tasks: {_change(next(iter(by_kind.values())), 2)} ({limit})."]
    each = ", ".join(f"{kind} {_change(passes, 2)}" for kind, passes in by_kind.items())
    return [f"Passes of a request for all tasks that read its kind of input: {each} (each {limit})."]


def task_rows(release: Mapping[str, Any]) -> list[list[str]]:
    """A heading and a row for each task."""
    rows = [["task", "version", "measure", "dev", "test", "search", "reads"]]
    for name, task in release["tasks"].items():
        figures = [
            _change({"before": (task["before"] or {}).get(split), "after": task["after"].get(split)}, 4)
            for split in ("dev", "test")
        ]
        search = f"{task['search']['dev']:.4f} of {task['search']['best']:.4f}"
        version = "new" if task["is_new"] else "as it is"
        rows.append([name, version, task["measure"], *figures, search, task["reads"]])
    return rows


def curve_rows(release: Mapping[str, Any]) -> list[list[str]]:
    kinds = list(release["passes"])
    rows = [["", "state", *(f"passes, {kind}" if len(kinds) > 1 else "passes" for kind in kinds), "average dev score"]]
    for number, point in enumerate(release["curve"], start=1):
        passes = [f"{point['passes'][kind]:.3f}" if kind in point["passes"] else "" for kind in kinds]
        rows.append([str(number), point["state"], *passes, f"{point['dev']:.4f}"])
    return rows


def curve_plot(release: Mapping[str, Any]) -> str:
    """An SVG of the rows of `curve_rows`, by their numbers; the state that is proposed, last but one, stands out."""
    points = release["curve"]
    marks = [
        Mark(number, sum(point["passes"].values()), point["dev"], chosen=number == len(points) - 1)
        for number, point in enumerate(points, start=1)
    ]
    kinds = list(release["passes"])
    x_name = "passes" if len(kinds) == 1 else f"passes, {' and '.join(kinds)} together"
    return drawing.standalone(drawing.curve(marks, None, x_name, "average dev score"))


def conclusions(release: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that is not as it was wanted."""
    points = 100 * release["tolerance"]
    found = [
        f"{lack['task']} is lacking: {lack['dev']:.4f} on dev, and {lack['best']:.4f} with {lack['best_reads']}, which "
        f"is {100 * lack['short_by']:.2f} points more than the tolerance of {points:g} allows."
        for lack in release["lacking"]
    ]
    found += [f"{name} is worse on dev than what is live, by more than {points:g} points." for name in release["worse"]]
    return found or [f"Every task is within {points:g} points of its best arrangement."]


def _change(figures: Mapping[str, float | None], digits: int) -> str:
    """Like 1.50 → 1.00; one number where there is no other, none where there is none."""
    shown = [f"{figure:.{digits}f}" for figure in (figures["before"], figures["after"]) if figure is not None]
    return " → ".join(shown)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its heading first."""
    heading, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|" + "---|" * len(rows[0]), *rest])
