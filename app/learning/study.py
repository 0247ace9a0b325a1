"""One task's data as the frozen backbone sees it: encodings, targets and states, made once for all ways to learn it.

Knows tables, the backbone and how one recipe is fitted; nothing of searches, reports or artifacts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from app.domain import Encoding, ProblemType, ReadoutKind
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError
from app.learning.alignment import tags_of_words, word_starts
from app.learning.cache import CachePlan, Extents, StateCache, build_cache
from app.learning.data import OUTSIDE, Table, check_fits, label_names, read_table
from app.learning.model import TaskModel
from app.learning.prepare import Frozen, cache_plan, encode, initial_prefix, limit_tokens, read_frozen, tokenized
from app.learning.problems import IGNORED, Scaling, num_outputs, targets_of
from app.learning.recipe import Recipe
from app.learning.splits import split_off_dev
from app.learning.trainer import Epoch, Split, num_rounds, predict_logits, train

_Key = tuple[tuple[str, ...], int]  # digests of frozen prefixes, position offset
_TRUNK: _Key = ((), 0)


class Watcher(Protocol):
    """Told of progress."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None:
        """An arrangement was fitted."""

    def notice(self, sentences: Sequence[str]) -> None:
        """What a person should know of the data."""


class Quiet:
    """A watcher that tells nobody: of so many fits, their stages and epochs would drown the rest."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None: ...

    def notice(self, sentences: Sequence[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Files:
    train: Path
    dev: Path | None = None  # None: a tenth of train is split off
    test: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The data of one task, found to fit together."""

    train: Table
    dev: Table
    test: Table | None
    labels: tuple[str, ...]
    whole: Table | None = None  # train's file, where dev was split off from it

    @classmethod
    def read(
        cls, files: Files, problem_type: ProblemType | None, seed: int = 0, tokenizer: TextTokenizer | None = None
    ) -> Tables:
        """Rows in which `tokenizer`, where it is given, finds nothing to read count as unreadable."""

        def read(path: Path) -> Table:
            table = read_table(path, problem_type)
            return table if tokenizer is None else tokenized(tokenizer, table)

        train = read(files.train)
        labels = label_names(train)
        given = None if files.dev is None else read(files.dev)
        test = None if files.test is None else read(files.test)
        for table in (given, test):
            if table is not None:
                check_fits(table, train, labels)
        if given is not None:
            return cls(train, given, test, labels)
        rest, dev = split_off_dev(train, seed=seed)
        return cls(rest, dev, test, labels, train)

    @property
    def problem_type(self) -> ProblemType:
        return self.train.problem_type

    @property
    def num_outputs(self) -> int:
        return num_outputs(self.problem_type, self.labels)

    @property
    def named(self) -> dict[str, Table]:
        return {"train": self.train, "dev": self.dev} | ({} if self.test is None else {"test": self.test})


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A trained model: what it is made of, how well it did on dev, and what it took."""

    recipe: Recipe
    model: TaskModel
    frozen: Frozen
    position_offset: int
    epochs: tuple[Epoch, ...]
    best: Epoch
    seconds: float

    @property
    def was_interrupted(self) -> bool:
        return self.best.was_interrupted


@dataclass(slots=True, eq=False)
class _View:
    """Encodings, targets and states of the splits, for one tuple of frozen prefixes and one position offset."""

    encodings: dict[str, list[Encoding]] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))  # layer → [tokens, d]
    extents: dict[str, Extents] = field(default_factory=dict)


class Study:
    """Not for several threads."""

    def __init__(self, tables: Tables, backbone: Backbone, tokenizer: TextTokenizer, watcher: Watcher) -> None:
        self.tables = tables
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.watcher = watcher
        self.scaling = Scaling.of(tables.train)
        self.measure = ""  # of dev, where no recipe says it; "": the problem's usual one
        self._views: dict[_Key, _View] = defaultdict(_View)
        self._whole: Study | None = None  # of which this is a part
        self._rows: Mapping[str, Sequence[int]] = {}

    def completed(self, recipe: Recipe) -> Recipe:
        tables = self.tables
        return recipe.completed(tables.problem_type, tables.num_outputs, self.backbone.spec, tables.train.input_kind)

    def prepare(self, recipes: Iterable[Recipe], splits: Iterable[str] = ("train", "dev")) -> None:
        """Compute what these recipes read, each layer of each text once."""
        plans = [cache_plan(recipe, read_frozen(recipe, self.backbone.spec)) for recipe in recipes]
        by_key: dict[_Key, list[CachePlan]] = defaultdict(list)
        of_trunk = [(_key(plan), below) for plan in plans if (below := _trunk_of(plan)) is not None]
        if len({key for key, _ in of_trunk} | ({*map(_key, plans)} & {_TRUNK})) > 1:  # else nobody shares it
            by_key[_TRUNK] += [below for _, below in of_trunk]  # first: they go on from there
        for plan in plans:
            by_key[_key(plan)].append(plan)
        for alike in by_key.values():
            for name in splits:
                self._compute(name, alike)

    def prepare_below(self, recipe: Recipe, splits: Iterable[str]) -> None:
        """Compute what a completed recipe of frozen prefixes has in common with the bare trunk."""
        below = _trunk_of(cache_plan(recipe, read_frozen(recipe, self.backbone.spec)))
        if below is not None:
            for name in splits:
                self._compute(name, [below])

    def part(self, rows: Mapping[str, Sequence[int]]) -> Study:
        """A study of these rows of the tables named: states are the whole's, and so is scaling. Not for tokens."""
        tables = {name: _taken(table, rows.get(name)) for name, table in self.tables.named.items()}
        labels = self.tables.labels
        both = Tables(tables["train"], tables["dev"], tables.get("test"), labels)
        part = Study(both, self.backbone, self.tokenizer, self.watcher)
        part.scaling, part._whole, part._rows = self.scaling, self, rows
        return part

    def forget(self, recipe: Recipe, but: Iterable[Recipe] = ()) -> None:
        """Free the states that only this recipe's frozen prefixes or positions make, and none of `but` reads.

        They come again when asked for.
        """
        key = self._view_of(recipe)
        if key != _TRUNK and key not in map(self._view_of, but):
            self._views.pop(key, None)
            if self._whole is not None:
                self._whole._views.pop(key, None)

    def _view_of(self, recipe: Recipe) -> _Key:
        return _key(cache_plan(recipe, read_frozen(recipe, self.backbone.spec)))

    def split(self, plan: CachePlan, name: str) -> Split:
        """The states that `plan` asks for of one table, and its targets."""
        self._compute(name, [plan])
        view = self._views[_key(plan)]
        states = view.states[name]
        fork = None if plan.fork_layer is None else states[plan.fork_layer]
        cache = StateCache(view.extents[name], {layer: states[layer] for layer in plan.cached_reads}, fork)
        return Split(cache, view.targets[name])

    def num_looks(self, recipe: Recipe) -> int:
        """At dev, of a fit that does not end early."""
        rows, dev_rows = len(self.tables.train.examples), len(self.tables.dev.examples)
        return recipe.epochs * num_rounds(rows, dev_rows, recipe.batch_size)

    def fit(self, recipe: Recipe, report: Callable[[Epoch, str], None] | None = None) -> Fitted:
        """Train a completed recipe; the epoch that is best on dev is kept."""
        began = time.perf_counter()
        kind, labels = self.tables.problem_type, self.tables.labels
        torch.manual_seed(recipe.seed)
        frozen = read_frozen(recipe, self.backbone.spec)
        plan = cache_plan(recipe, frozen)
        splits = self._seen(recipe, plan, "train"), self._seen(recipe, plan, "dev")
        prefix = initial_prefix(recipe, self.backbone, splits[0].cache)
        model = TaskModel(recipe, self.backbone, self.tables.num_outputs, prefix).to(self.backbone.device)
        tell = self.watcher.epoch if report is None else report
        epochs = train(model, splits, kind, labels, lambda epoch: tell(epoch, recipe.measure))
        best = next(epoch for epoch in reversed(epochs) if epoch.is_best)
        seconds = time.perf_counter() - began
        return Fitted(recipe, model, frozen, plan.position_offset, tuple(epochs), best, seconds)

    def logits(self, fitted: Fitted, name: str) -> tuple[Tensor, Tensor]:
        """Logits and targets of one table's texts; of tokens, of the tagged ones."""
        split = self._seen(fitted.recipe, cache_plan(fitted.recipe, fitted.frozen), name)
        logits, targets, _ = predict_logits(fitted.model, split, self.tables.problem_type)
        return logits, targets

    def tagged(self, fitted: Fitted, name: str) -> list[Tensor]:
        """The tag ids of each text of one table, in the order of `logits`."""
        return self._seen(fitted.recipe, cache_plan(fitted.recipe, fitted.frozen), name).tagged

    def _seen(self, recipe: Recipe, plan: CachePlan, name: str) -> Split:
        """A split as the recipe's readout sees it: of frozen states, what is the same in every epoch is done once."""
        split = self.split(plan, name)
        is_fixed_mean = recipe.readout is ReadoutKind.MEAN and plan.fork_layer is None
        return split.pooled(self.backbone.device) if is_fixed_mean else split

    def texts(self, name: str) -> tuple[list[Encoding], Tensor]:
        """Encodings and targets of one table as the bare trunk reads them."""
        plan = CachePlan(())
        return self._encode(name, plan), self._views[_key(plan)].targets[name]

    def word_tags(self, name: str, found: Tensor) -> list[list[str]]:
        """For each text a tag for each word, of label ids of the bare trunk's tagged tokens end to end."""
        encodings, targets = self.texts(name)
        ids = torch.full_like(targets, self.tables.labels.index(OUTSIDE))
        ids[targets != IGNORED] = found
        rows = torch.split(ids, [len(encoding) for encoding in encodings])
        labels, examples = self.tables.labels, self.tables.named[name].examples
        return [
            tags_of_words(word_starts(encoding, example.words), [labels[i] for i in row.tolist()])
            for example, encoding, row in zip(examples, encodings, rows, strict=True)
        ]

    def _compute(self, name: str, plans: list[CachePlan]) -> None:
        """Add the states that are not there yet: behind layers in one pass that goes on from lower ones where they are
        there, and of the embeddings."""
        plan = plans[0]
        if self._whole is not None:
            self._whole._compute(name, plans)
            self._views[_key(plan)] = _part_of(self._whole._views[_key(plan)], self._rows)
            return
        states = self._views[_key(plan)].states[name]
        wanted = _wanted(plans)
        if wanted - set(states):
            self._take_from_trunk(name, plan, _below(plan, wanted))
        layers = tuple(sorted(wanted - set(states) - {0}))
        if layers:
            states |= self._run(name, plan, CachePlan(layers, None, plan.prefixes, plan.position_offset)).reads
        if 0 in wanted and 0 not in states:
            embedded = self._run(name, plan, CachePlan((), 0, plan.prefixes, plan.position_offset)).fork
            assert embedded is not None
            states[0] = embedded

    def _take_from_trunk(self, name: str, plan: CachePlan, below: set[int]) -> None:
        """Where it has run for others."""
        own, trunk = self._views[_key(plan)], self._views[_TRUNK]
        if not below or not trunk.states[name].keys() - {0}:
            return
        self._compute(name, [CachePlan(tuple(sorted(below)))])
        own.states[name] |= {layer: trunk.states[name][layer] for layer in below}
        own.encodings[name], own.targets[name] = trunk.encodings[name], trunk.targets[name]
        own.extents[name] = trunk.extents[name]

    def _run(self, name: str, plan: CachePlan, keep: CachePlan) -> StateCache:
        encodings = self._encode(name, plan)
        self.watcher.stage(f"frozen layers, {name}", len(encodings))
        view = self._views[_key(plan)]
        lower = [layer for layer in view.states[name] if 0 < layer < min(keep.cached_reads, default=0)]
        begin = (max(lower), view.states[name][max(lower)]) if lower else None
        cache = build_cache(self.backbone, encodings, keep, self.watcher.advance, begin=begin)
        view.extents[name] = cache.extents
        return cache

    def _encode(self, name: str, plan: CachePlan) -> list[Encoding]:
        if self._whole is not None:
            self._whole._encode(name, plan)
            self._views[_key(plan)] = _part_of(self._whole._views[_key(plan)], self._rows)
        view = self._views[_key(plan)]
        if name not in view.encodings:
            table = self.tables.named.get(name)
            if table is None:
                raise DataError(f"there is no {name} file")
            encodings = encode(self.tokenizer, table, limit_tokens(self.backbone.spec, plan))
            view.targets[name] = targets_of(table, self.tables.labels, encodings, self.scaling)
            view.encodings[name] = encodings
        return view.encodings[name]


def _taken(table: Table, rows: Sequence[int] | None) -> Table:
    return table if rows is None else replace(table, examples=tuple(table.examples[row] for row in rows))


def _part_of(view: _View, rows: Mapping[str, Sequence[int]]) -> _View:
    part = _View(dict(view.encodings), dict(view.targets), view.states, dict(view.extents))
    for name, chosen in rows.items():
        index = torch.tensor(chosen)
        if name in view.encodings:
            part.encodings[name] = [view.encodings[name][row] for row in chosen]
            part.targets[name] = view.targets[name][index]
        if name in view.extents:
            part.extents[name] = view.extents[name].of(index)
    return part


def _wanted(plans: Iterable[CachePlan]) -> set[int]:
    """Layers, as numbers of those passed."""
    return {layer for plan in plans for layer in (*plan.cached_reads, plan.fork_layer) if layer is not None}


def _below(plan: CachePlan, wanted: set[int]) -> set[int]:
    """Layers of `plan` that are as in the bare trunk, which is run once for all: those up to its first prefix.

    What goes on from there has been rounded, as all states that are kept.
    """
    first = min((prefix.first_layer for prefix in plan.prefixes), default=0)
    if not first or plan.position_offset:
        return set()
    return {layer for layer in wanted if layer <= first} | ({first} if max(wanted) > first else set())


def _trunk_of(plan: CachePlan) -> CachePlan | None:
    """What the bare trunk computes for `plan`; None: nothing."""
    below = _below(plan, _wanted([plan]))
    return CachePlan(tuple(sorted(below))) if below else None


def _key(plan: CachePlan) -> _Key:
    return tuple(prefix.digest for prefix in plan.prefixes), plan.position_offset
