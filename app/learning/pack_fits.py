"""Measures what a task may read when many are packed: fits of readouts, heads and own prefixes, and their dev scores.

Knows studies, and notes of earlier fits; nothing of which arrangement is worth a pass. Writes prefixes and notes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.domain import BackboneSpec, ProblemType, ReadoutKind
from app.engine.artifact import flatten_prefix, read_artifact
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, prefix_digest
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning import writer
from app.learning.learn import with_enough_steps
from app.learning.notes import Notes, Trial, key_of
from app.learning.pack_tasks import (
    SHORT_TRUNK,
    TRUNK,
    Live,
    PrefixTuple,
    Source,
    Task,
    named,
    num_virtual_tokens_of,
    whole_artifact,
)
from app.learning.prepare import read_frozen
from app.learning.recipe import Recipe
from app.learning.search import passes_of
from app.learning.study import Fitted, Quiet, Study, Tables, Watcher

TRUNK_FITS, MOST_READOUTS = 5, 2  # at most: of a task on the bare trunk, and on any other tuple
OTHER_RATES = (3.0, 1 / 3)  # times a readout's own, for a task that lacks where it has come to stand
_READOUT_STEPS = 900  # over fixed states a step costs next to nothing, and with a third of them emotion lost 8 points
_LINEAR_RATE = 10.0  # times a readout's: a single layer learns best so
_NEAR_READOUT = 0.03  # a linear head that is no more than this behind is tried wherever a readout with queries is


@dataclass(slots=True, eq=False)
class Fitter:
    """One task at a time; what is found stands in the task."""

    backbone: Backbone
    watcher: Watcher
    notes: Notes
    count: int = 0  # of fits, those that were known in it

    def alone(self, task: Task, first_layers: Sequence[int]) -> None:
        """On the bare trunk, with a prefix of its own, and beside what it reads now."""
        study = self._study(task)
        self._measure_trunk(task, study)
        for first_layer in first_layers:
            if first_layer < task.readout.read_layers[-1]:
                self._measure_own(task, study, first_layer)
        if task.live is not None:
            self._compare_live(task, task.live, study)

    def on(self, task: Task, read: PrefixTuple) -> None:
        """Its readouts on a tuple."""
        self._fit_readouts(task, read, self._study(task))

    def at_other_rates(self, task: Task, read: PrefixTuple, recipe: Recipe) -> None:
        """`recipe`: what was found best on this tuple."""
        study = self._study(task)
        others = [replace(recipe, learning_rate=factor * recipe.learning_rate) for factor in OTHER_RATES]
        self._prepare(study, others)
        for other in others:
            name = f"{named(read)}, rate {other.learning_rate:.2g}"
            task.note(read, self._fit(task, study, other, name).dev, other)

    def _measure_trunk(self, task: Task, study: Study) -> None:
        """Readouts at two pairs of rates, then of all layers and of all but the last; and a linear head, which can be
        best where rows are few for each label."""
        base = with_enough_steps(task.bare, len(task.part.train.examples), _READOUT_STEPS)
        slow = study.completed(base)
        fast = replace(slow, learning_rate=3 * slow.learning_rate, query_learning_rate=slow.query_learning_rate / 3)
        layers = tuple(range(1, self.backbone.spec.num_layers + 1))
        self._prepare(study, [slow, fast], (replace(slow, read_layers=layers),))
        fits = [self._fit_trunk(task, study, slow, ""), self._fit_trunk(task, study, fast, ", other rates")]
        better = max(fits, key=_dev).recipe
        wide = replace(better, read_layers=layers)
        if wide != better:
            fits.append(self._fit_trunk(task, study, wide, " of all layers"))
        best = max(fits, key=_dev)
        task.readouts = [best.recipe]
        if len(layers) > 1:
            short = replace(better, read_layers=layers[:-1])
            trial = self._fit(task, study, short, f"{named(SHORT_TRUNK)}, {short.readout}")
            task.note(SHORT_TRUNK, trial.dev, short)
        if slow.reads.kind.has_queries:
            linear = base.linear(_LINEAR_RATE * base.learning_rate)
            plain = self._fit_trunk(task, study, study.completed(linear), ", linear")
            if _dev(plain) >= _dev(best) - _NEAR_READOUT:
                task.readouts.append(plain.recipe)

    def _fit_trunk(self, task: Task, study: Study, recipe: Recipe, told: str) -> Trial:
        trial = self._fit(task, study, recipe, f"bare trunk, {recipe.readout}{told}")
        task.note(TRUNK, trial.dev, recipe)
        return trial

    def _measure_own(self, task: Task, study: Study, first_layer: int) -> None:
        """A prefix is trained for as long as its member says, and readouts then fitted on it for longer."""
        count, bare = num_virtual_tokens_of(task.member), task.bare
        schedule = replace(task.readout, epochs=bare.epochs, patience=bare.patience)
        recipe = study.completed(replace(schedule, num_virtual_tokens=count, first_layer=first_layer))
        key = self._key(study, recipe)
        path = self.notes.folder / f"prefix-{key}"
        if whole_artifact(path, self.backbone.spec) is None:
            self.notes.forget(key)
        name = f"own prefix from layer {first_layer}"
        trial = self._fit(task, study, recipe, name, lambda fitted: _write_prefix(path, fitted, self.backbone.spec))
        source = Source(task.name, path, read_artifact(path, self.backbone.spec).version(0).prefixes, is_live=False)
        task.sources.append(source)
        task.own[source] = recipe
        task.note((source,), trial.dev, recipe)
        self._fit_readouts(task, (source,), study)

    def _compare_live(self, task: Task, live: Live, study: Study) -> None:
        """Where it learned from more rows, its prefixes get a new readout from the search's."""
        read = TRUNK
        if live.version.prefixes:
            source = Source(task.name, live.path, live.version.prefixes, is_live=True)
            task.sources.append(source)
            read = (source,)
        if not task.live_is_ahead:
            task.note(read, live.dev)
        elif read:
            self._fit_readouts(task, read, study)

    def _fit_readouts(self, task: Task, read: PrefixTuple, study: Study) -> None:
        paths = tuple(source.path for source in read)
        recipes = [study.completed(replace(readout, prefixes=paths)) for readout in task.readouts]
        self._prepare(study, recipes)
        for recipe in recipes:
            name = named(read) if recipe.readout is task.readout.readout else f"{named(read)}, {recipe.readout}"
            task.note(read, self._fit(task, study, recipe, name).dev, recipe)
        study.forget(recipes[0])

    def _prepare(self, study: Study, recipes: Sequence[Recipe], wider: Sequence[Recipe] = ()) -> None:
        """Unless all of them are known. `wider`: with more layers, at once, since they come next."""
        if any(self._key(study, recipe) not in self.notes for recipe in recipes):
            study.prepare([*recipes, *wider])

    def _fit(
        self, task: Task, study: Study, recipe: Recipe, name: str, keep: Callable[[Fitted], None] | None = None
    ) -> Trial:
        """As it is known, or now; `keep` is given what is fitted now."""
        key = self._key(study, recipe)
        if key not in self.notes:
            fitted = study.fit(recipe, lambda *_: None)
            if fitted.was_interrupted:
                raise KeyboardInterrupt
            if keep is not None:
                keep(fitted)
            self.notes.add(key, Trial(recipe, fitted.best.dev, fitted.seconds))
        trial = self.notes.trial(key, recipe)
        self.count += 1
        self.watcher.candidate(f"{task.name}: {name}", passes_of(recipe, self.backbone.spec), trial.dev, trial.seconds)
        return trial

    def _key(self, study: Study, recipe: Recipe) -> str:
        return key_of(recipe, made_from(recipe, study.tables, ("train", "dev"), self.backbone.spec))

    def _study(self, task: Task) -> Study:
        """A new one each time: the states of all tasks would not fit into memory."""
        return Study(task.part, self.backbone, TextTokenizer(self.backbone.path), Quiet())


def _dev(trial: Trial) -> float:
    return trial.dev


def made_from(recipe: Recipe, tables: Tables, names: Collection[str], spec: BackboneSpec) -> dict[str, Any]:
    """What a fit depends on beside its recipe: rows of the tables in `names`, the problem, frozen prefixes, model."""
    rows = {name: [table.sha256, len(table.examples)] for name, table in tables.named.items() if name in names}
    return {
        "rows": rows,
        "problem": [tables.problem_type, *tables.labels],
        "prefixes": [prefix.digest for prefix in read_frozen(recipe, spec).prefixes],
        "model": [spec.fingerprint, spec.dtype],
    }


def _write_prefix(path: Path, fitted: Fitted, spec: BackboneSpec) -> None:
    """A trained prefix alone, as a representation that others can read."""
    recipe, prefix = fitted.recipe, fitted.model.prefix
    assert prefix is not None
    flat = flatten_prefix(prefix.detach().cpu()).to(writer.STORED)
    entry = {
        "digest": prefix_digest(flat, recipe.first_layer),
        "num_virtual_tokens": recipe.num_virtual_tokens,
        "first_layer": recipe.first_layer,
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": recipe.task,
        "problem_type": ProblemType.EMBEDDING,
        "labels": [],
        "readout": {"kind": ReadoutKind.MEAN, "layers": [spec.num_layers]},
        "prefixes": [entry],
        "position_offset": fitted.position_offset,
        "backbone": {"fingerprint": spec.fingerprint},
    }
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run, and broken
    with writer.new_folder(path, "--work") as folder:
        writer.write_tensors(folder, {PROMPT: flat})
        writer.write_manifest(folder, manifest)
