"""The paper's experiment: independent prefixes of source tasks, combined, against other fixed representations.

After Huang et al. 2023 (arXiv 2305.13499). Runs what is missing of a plan, in order, and keeps every finished cell at
once, so that an interrupted run goes on where it was. Knows nothing of tables or plots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor

from app.domain import BackboneSpec, InputKind, ProblemType, ReadoutKind
from app.engine.backbone import Backbone
from app.engine.heads import scores_of
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError
from app.learning import evaluation, writer
from app.learning.experiment_plan import (
    ALL,
    ATTENTION,
    BARE,
    CEILING,
    LINEAR,
    LINEAR_RATE,
    MEASURED,
    OWN,
    READOUTS,
    SHARED,
    WHOLE,
    Cell,
    Kind,
    Ledger,
    Outcome,
    Part,
    Plan,
    Step,
    alone,
    cells,
    made_of,
    measure_of,
    unfinished,
)
from app.learning.finetune import FinetuneSettings, Texts, finetune, whole_logits
from app.learning.multitask import Together, finetune_together, train_shared_prefix, write_prefix
from app.learning.recipe import Recipe, epochs_for
from app.learning.splits import findings, sampled_rows, subsample
from app.learning.study import Files, Fitted, Quiet, Study, Tables

_METHOD = 2  # how numbers are found; other ones do not stand beside them
_SPLITS = ("train", "dev", "test")
_TEST = {"subj": "test_clean.tsv", "stsb": "test_clean.tsv"}  # rows that other sets have too are left out


# -- data --------------------------------------------------------------------------------------------------------------


class Sets:
    """The data sets of a plan, cut as it says."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Raises DataError for a set that is not there or cannot be used."""
        self._plan = plan
        self.whole: dict[str, Tables] = {}
        for name in (*plan.sources, *plan.targets):
            files = Files(*(folder / name / f for f in ("train.tsv", "dev.tsv", _TEST.get(name, "test.tsv"))))
            self.whole[name] = Tables.read(files, None)
            if self.whole[name].problem_type is ProblemType.TOKEN:
                raise DataError(f"{name} tags tokens: the experiment's heads read whole texts")

    def source(self, name: str, seed: int) -> Tables:
        return self._cut(name, self._plan.source_rows, self._plan.source_dev_rows, seed)

    def target(self, name: str, seed: int) -> Tables:
        """With as many rows as its largest size asks for."""
        sizes = self._plan.sizes
        if ALL in sizes:
            return self._cut(name, None, None, seed)
        return self._cut(name, max(sizes), self._plan.few_dev_rows, seed)

    def _cut(self, name: str, train: int | None, dev: int | None, seed: int) -> Tables:
        tables = self.whole[name]
        assert tables.test is not None
        return replace(
            tables,
            train=tables.train if train is None else subsample(tables.train, train, seed),
            dev=tables.dev if dev is None else subsample(tables.dev, dev, seed),
            test=tables.test if self._plan.test_rows is None else subsample(tables.test, self._plan.test_rows, 0),
        )

    def digests(self) -> dict[str, dict[str, str]]:
        return {
            name: {split: table.sha256 for split, table in tables.named.items()} for name, tables in self.whole.items()
        }

    def shared_texts(self) -> dict[str, int]:
        """Target → how many of its test texts some source is trained on."""
        counts = {}
        for target in self._plan.targets:
            test = self.whole[target].test
            assert test is not None
            found = [findings({"train": self.whole[s].train, "test": test}) for s in self._plan.sources]
            counts[target] = sum(each.overlaps["test"].count for each in found)
        return counts


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    plan: Plan
    sets: Sets
    backbone: Backbone
    tokenizer: TextTokenizer
    results: Ledger
    work: Path  # what is trained lies here, a folder each

    def run(self) -> None:
        for step in unfinished(self.plan, self.results.found):
            self.take(step)

    def take(self, step: Step) -> None:
        """Find what is missing of one step. The steps that it needs are done, in this process or another."""
        match step.kind:
            case Kind.SOURCE:
                self._source(step.name, step.seed)
            case Kind.SHARED:
                self._shared_prefix(made_of(step.name, self.plan), step.name, step.seed)
            case Kind.WHOLE:
                self._whole_backbone(made_of(step.name, self.plan), step.name, step.seed)
            case Kind.TARGETS:
                self._targets(step.name, step.seed)
            case Kind.CEILING:
                self._ceiling(step.name, step.seed)

    def _missing(self, wanted: Iterator[Cell] | Sequence[Cell]) -> list[Cell]:
        return [cell for cell in wanted if cell not in self.results.found]

    def _add(self, cell: Cell, outcome: Outcome) -> None:
        if cell not in self.results.found:
            self.results.add(cell, outcome)

    def _study(self, tables: Tables, backbone: Backbone | None = None) -> Study:
        return Study(tables, backbone or self.backbone, self.tokenizer, Quiet())

    def _source_study(self, source: str, seed: int) -> Study:
        study = self._study(self.sets.source(source, seed))
        study.measure = self._measure(source)
        return study

    def _folder(self, name: str, seed: int) -> Path:
        return self.work / f"seed{seed}" / name.replace(" ", "-")

    # -- sources

    def _source(self, source: str, seed: int) -> None:
        bare = [Cell(Part.SOURCE, seed, source, BARE, readout) for readout in READOUTS]
        own = {readout: Cell(Part.SOURCE, seed, source, OWN, readout) for readout in READOUTS}
        ceiling = Cell(Part.SOURCE, seed, source, CEILING)
        folder = self._folder(alone(source), seed)
        study = self._study(self.sets.source(source, seed))
        missing = self._missing(bare)
        study.prepare((self._head(study, cell.readout, (), seed, source) for cell in missing), _SPLITS)
        for cell in missing:
            self._add(cell, self._fitted(study, self._head(study, cell.readout, (), seed, source), source)[0])
        if self._missing([own[LINEAR]]) or not folder.is_dir():
            recipe = self.prefix_recipe(source, seed)
            outcome, fitted = self._fitted(study, recipe, source)
            assert fitted.model.prefix is not None
            write_prefix(folder, source, fitted.model.prefix, recipe.first_layer, self.backbone.spec)
            self._add(own[LINEAR], outcome)
        if self._missing([own[ATTENTION]]):
            self._add(
                own[ATTENTION], self._fitted(study, self._head(study, ATTENTION, (folder,), seed, source), source)[0]
            )
        if self._missing([ceiling]):
            self._add(ceiling, self._full(study, source, seed, self.plan.finetuning))

    def prefix_recipe(self, source: str, seed: int) -> Recipe:
        """How a source's own prefix is trained: under a linear head, so that all that is learned is in the states."""
        is_pair = self.sets.whole[source].train.input_kind is InputKind.PAIR
        settings = self.plan.pair if is_pair else self.plan.single
        recipe = Recipe(
            task=source,
            readout=ReadoutKind.MEAN,
            hidden=0,
            first_layer=self.backbone.spec.num_layers // 2,
            num_virtual_tokens=settings.num_virtual_tokens,
            epochs=settings.epochs,
            learning_rate=settings.head_learning_rate,
            prefix_learning_rate=settings.learning_rate,
            seed=seed,
            measure=self._measure(source),
        )
        tables = self.sets.whole[source]
        return recipe.completed(tables.problem_type, tables.num_outputs, self.backbone.spec, tables.train.input_kind)

    def _measure(self, task: str) -> str:
        return measure_of(task, self.sets.whole[task].problem_type)

    def _fitted(self, study: Study, recipe: Recipe, task: str) -> tuple[Outcome, Fitted]:
        fitted = study.fit(recipe, lambda *_: None)
        if fitted.was_interrupted:
            raise KeyboardInterrupt
        logits = {name: study.logits(fitted, name)[0] for name in ("dev", "test")}
        prefix = fitted.model.prefix
        outcome = _outcome(task, study, logits, fitted.seconds)
        if prefix is None:
            return outcome, fitted
        num_tokens = sum(map(len, study.texts("train")[0]))
        trunk = recipe.first_layer / self.backbone.spec.num_layers
        tokens = round(num_tokens * (trunk + fitted.epochs[-1].number * (1 - trunk)))
        return replace(outcome, num_parameters=prefix.numel(), tokens=tokens), fitted

    def _full(self, study: Study, task: str, seed: int, settings: FinetuneSettings) -> Outcome:
        """The whole backbone fine-tuned for one task."""
        texts = {name: Texts(*study.texts(name)) for name in study.tables.named}
        tables, device = study.tables, study.backbone.device
        both = texts["train"], texts["dev"]
        tuned = finetune(
            self.backbone.path,
            both,
            tables.problem_type,
            tables.labels,
            replace(settings, seed=seed),
            device,
            dtype=self.backbone.dtype,
            measure=self._measure(task),
        )
        logits = {name: whole_logits(tuned.model, texts[name], device)[0] for name in ("dev", "test")}
        num_parameters = sum(w.numel() for name, w in tuned.model.named_parameters() if name.startswith("network."))
        outcome = _outcome(task, study, logits, tuned.seconds)
        return replace(outcome, num_parameters=num_parameters, tokens=tuned.tokens)

    # -- all sources at once

    def _shared_prefix(self, sources: tuple[str, ...], name: str, seed: int) -> None:
        folder, wanted = self._folder(name, seed), self._training_cells(sources, name, seed)
        if not self._missing(wanted) and folder.is_dir():
            return
        studies = {source: self._source_study(source, seed) for source in sources}
        recipes = {source: self.prefix_recipe(source, seed) for source in sources}
        vectors, done = train_shared_prefix(studies, recipes)
        write_prefix(folder, folder.name, vectors, recipes[sources[0]].first_layer, self.backbone.spec)
        self._add_training(wanted, studies, done)

    def _whole_backbone(self, sources: tuple[str, ...], name: str, seed: int) -> None:
        folder, wanted = self._folder(name, seed), self._training_cells(sources, name, seed)
        if not self._missing(wanted) and folder.is_dir():
            return
        studies = {source: self._source_study(source, seed) for source in sources}
        network, done = finetune_together(studies, replace(self.plan.finetuning, seed=seed))
        rmtree(folder, ignore_errors=True)
        with writer.new_folder(folder) as draft:
            network.save_pretrained(draft)
        self._add_training(wanted, studies, done)

    def _training_cells(self, sources: tuple[str, ...], name: str, seed: int) -> list[Cell]:
        cost = Cell(Part.TRAINING, seed, "", name)
        if len(sources) < len(self.plan.sources):
            return [cost]
        return [*(Cell(Part.SOURCE, seed, source, name, LINEAR) for source in sources), cost]

    def _add_training(self, wanted: Sequence[Cell], studies: Mapping[str, Study], done: Together) -> None:
        outcomes = {}
        for source, study in studies.items():
            logits = {table: done.logits(source, table) for table in ("dev", "test")}
            outcomes[source] = _outcome(source, study, logits, 0.0)
        score, dev = (_mean([getattr(o, name) for o in outcomes.values()]) for name in ("score", "dev"))
        cost = Outcome(score, dev, done.seconds, done.num_parameters, done.tokens)
        for cell in wanted:
            self._add(cell, outcomes[cell.task] if cell.part is Part.SOURCE else cost)

    # -- targets

    def _targets(self, target: str, seed: int) -> None:
        """Light heads of one target on all representations. What these have in common of the encoder runs once."""
        of_target = (c for c in cells(self.plan) if c.part is Part.TARGET and (c.seed, c.task) == (seed, target))
        missing = self._missing([cell for cell in of_target if cell.representation != CEILING])
        if not missing:
            return
        study = self._study(self.sets.target(target, seed))
        if any(not cell.representation.startswith(WHOLE) for cell in missing):
            _, any_prefix = self._representation(alone(self.plan.sources[0]), seed)  # all begin at one layer
            study.prepare_below(self._head(study, ATTENTION, any_prefix, seed, target), _SPLITS)  # in nobody's seconds
        for name in dict.fromkeys(cell.representation for cell in missing):
            backbone, prefixes = self._representation(name, seed)
            own = study if backbone is self.backbone else self._study(study.tables, backbone)
            self._target(target, own, prefixes, [cell for cell in missing if cell.representation == name])

    def _ceiling(self, target: str, seed: int) -> None:
        missing = self._missing([Cell(Part.TARGET, seed, target, CEILING, examples=n) for n in self.plan.sizes])
        if missing:
            study = self._study(self.sets.target(target, seed))
            for cell in missing:
                part = study.part(self._rows(study.tables, cell))
                self._add(cell, self._full(part, target, seed, self._finetuning(part)))

    def _finetuning(self, study: Study) -> FinetuneSettings:
        """Few rows are gone through more often."""
        settings, rows = self.plan.finetuning, len(study.tables.train.examples)
        return replace(
            settings, epochs=max(settings.epochs, epochs_for(self.plan.least_steps, rows, settings.batch_size))
        )

    def _representation(self, name: str, seed: int) -> tuple[Backbone, tuple[Path, ...]]:
        """The frozen encoder and the prefixes that stand in it."""
        if name.startswith(WHOLE):
            return self._tuned(name, seed), ()
        if name.startswith(SHARED):
            return self.backbone, (self._folder(name, seed),)
        return self.backbone, tuple(self._folder(alone(source), seed) for source in made_of(name, self.plan))

    def _tuned(self, name: str, seed: int) -> Backbone:
        spec = self.backbone.spec
        return Backbone.load(str(self._folder(name, seed)), spec.device, spec.dtype)

    def _target(self, target: str, study: Study, prefixes: tuple[Path, ...], missing: Sequence[Cell]) -> None:
        """The largest size first, with the time for the states in it."""
        began = time.perf_counter()
        seed = missing[0].seed
        study.prepare((self._head(study, readout, prefixes, seed, target) for readout in READOUTS), _SPLITS)
        waited = time.perf_counter() - began
        for cell in sorted(missing, key=lambda cell: cell.examples or math.inf, reverse=True):
            part = study.part(self._rows(study.tables, cell))
            outcome, _ = self._fitted(part, self._head(part, cell.readout, prefixes, seed, target), target)
            self._add(cell, replace(outcome, seconds=round(outcome.seconds + waited, 2)))
            waited = 0.0
        study.forget(self._head(study, LINEAR, prefixes, seed, target))

    def _rows(self, tables: Tables, cell: Cell) -> dict[str, list[int]]:
        """Which rows of train and dev a size takes."""
        if cell.examples == ALL:
            return {}
        sizes = {"train": cell.examples, "dev": self.plan.few_dev_rows}
        return {name: sampled_rows(tables.named[name], count, cell.seed) for name, count in sizes.items()}

    def _head(self, study: Study, readout: str, prefixes: tuple[Path, ...], seed: int, task: str) -> Recipe:
        """A light head; few rows are gone through more often."""
        rows = len(study.tables.train.examples)
        attention = ReadoutKind.ATTENTION  # of pairs too: all targets are read in the same two ways
        base = Recipe(task="head", readout=attention, prefixes=prefixes, seed=seed, measure=self._measure(task))
        epochs = max(self.plan.head_epochs, epochs_for(self.plan.least_steps, rows, base.batch_size))
        patience = -(-base.patience * epochs // self.plan.head_epochs)
        base = replace(base, epochs=epochs, patience=patience)
        if readout == LINEAR:
            base = base.linear(LINEAR_RATE)
        return study.completed(base)


def _outcome(task: str, study: Study, logits: Mapping[str, Tensor], seconds: float) -> Outcome:
    """Figures of logits on dev and test; thresholds are dev's."""
    tables, kind = study.tables, study.tables.problem_type
    assert tables.test is not None
    scores = {name: scores_of(kind, found.float().cpu()).numpy() for name, found in logits.items()}
    is_multi = kind is ProblemType.MULTI_LABEL
    thresholds = evaluation.thresholds_of_scores(tables.dev, scores["dev"], tables.labels) if is_multi else []
    figures = {
        name: evaluation.figures_of_scores(tables.named[name], found, tables.labels, thresholds)
        for name, found in scores.items()
    }
    measure = measure_of(task, kind)
    return Outcome(
        figures["test"].get(measure, 0.0), figures["dev"].get(measure, 0.0), round(seconds, 2), figures=figures["test"]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def header(plan: Plan, sets: Sets, spec: BackboneSpec) -> dict[str, Any]:
    """What results are results of; further seeds can be added to them."""
    settings = asdict(plan)
    del settings["seeds"]
    return {
        "plan": settings,
        "measured": MEASURED,
        "method": _METHOD,
        "data": sets.digests(),
        "backbone": spec.fingerprint,
        "dtype": spec.dtype,
    }
