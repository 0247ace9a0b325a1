"""One task from files to an artifact: read, cache, train, write, measure through the engine, move into place.

Knows the order of things; each step is another module's. Draws nothing: it reports to a `Watcher`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from app.domain import BackboneSpec, HeadKind, ProblemType
from app.engine.artifact import Artifact, build_artifact, flatten_prefix, read_artifact
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, prefix_digest
from app.engine.backbone import Backbone
from app.engine.golden import check_golden
from app.engine.heads import head_tensor_names
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError
from app.learning import evaluation, writer
from app.learning.cache import build_cache
from app.learning.data import Table, check_fits, label_names, read_table
from app.learning.model import TaskModel
from app.learning.prepare import Frozen, cache_plan, encode, initial_prefix, limit_tokens, read_frozen
from app.learning.problems import MEASURES, Scaling, num_outputs, targets_of
from app.learning.recipe import Recipe
from app.learning.trainer import Epoch, Split, train

_MAX_GOLDEN_DIFFERENCE = 1e-4


class Watcher(Protocol):
    """Told of progress."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Files:
    train: Path
    dev: Path
    test: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The data of one task, found to fit together."""

    train: Table
    dev: Table
    test: Table | None
    labels: tuple[str, ...]

    @classmethod
    def read(cls, files: Files, problem_type: ProblemType | None) -> Tables:
        train_table = read_table(files.train, problem_type)
        labels = label_names(train_table)
        dev = read_table(files.dev, problem_type)
        test = None if files.test is None else read_table(files.test, problem_type)
        for table in (dev, test):
            if table is not None:
                check_fits(table, train_table, labels)
        return cls(train_table, dev, test, labels)

    @property
    def named(self) -> dict[str, Table]:
        return {"train": self.train, "dev": self.dev} | ({} if self.test is None else {"test": self.test})


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A trained model with what is needed to write it."""

    recipe: Recipe
    tables: Tables
    tensors: dict[str, Tensor]
    prefixes: list[dict[str, object]]
    position_offset: int
    best: Epoch


def learn(
    recipe: Recipe,
    files: Files,
    out: Path,
    backbones: tuple[Backbone, Backbone],
    watcher: Watcher,
    problem_type: ProblemType | None = None,
) -> dict[str, Any]:
    """Learn a task and write its artifact to `out`. `backbones`: one to train on, one in float32 to measure with.

    Returns the manifest. Raises a ManifoldError; whatever happens, `out` is never half written.
    """
    writer.check_out(out.absolute())
    backbone, exact = backbones
    tables = Tables.read(files, problem_type)
    kind = tables.train.problem_type
    recipe = recipe.completed(kind, num_outputs(kind, tables.labels), backbone.spec)
    tokenizer = TextTokenizer(backbone.path)
    learned = _train(recipe, tables, backbone, tokenizer, watcher)
    with writer.new_folder(out) as folder:
        return _write(folder, learned, exact, tokenizer, watcher)


def _train(recipe: Recipe, tables: Tables, backbone: Backbone, tokenizer: TextTokenizer, watcher: Watcher) -> Learned:
    torch.manual_seed(recipe.seed)
    frozen = read_frozen(recipe, backbone.spec)
    plan = cache_plan(recipe, frozen)
    scaling = Scaling.of(tables.train)
    encodings = [encode(tokenizer, table, limit_tokens(backbone.spec, plan)) for table in (tables.train, tables.dev)]
    watcher.stage("frozen layers", sum(map(len, encodings)))
    caches = [build_cache(backbone, texts, plan, watcher.advance) for texts in encodings]
    targets = [
        targets_of(table, tables.labels, texts, scaling)
        for table, texts in zip((tables.train, tables.dev), encodings, strict=True)
    ]
    kind = tables.train.problem_type
    model = TaskModel(recipe, backbone, num_outputs(kind, tables.labels), initial_prefix(recipe, backbone, caches[0]))
    model.to(backbone.device)
    watcher.stage("training", recipe.epochs)
    train_split, dev_split = (Split(cache, target) for cache, target in zip(caches, targets, strict=True))
    best = train(
        model, (train_split, dev_split), kind, tables.labels, lambda epoch: watcher.epoch(epoch, MEASURES[kind])
    )
    tensors = model.tensors()
    if kind is ProblemType.REGRESSION:
        _fold(tensors, recipe, scaling)
    prefixes = _add_prefixes(tensors, model, frozen)
    return Learned(recipe, tables, tensors, prefixes, plan.position_offset, best)


def _fold(tensors: dict[str, Tensor], recipe: Recipe, scaling: Scaling) -> None:
    """Let the last layer answer in the data's own units."""
    weight, bias = _last_layer(recipe)
    tensors[weight] = tensors[weight] * scaling.std
    tensors[bias] = tensors[bias] * scaling.std + scaling.mean


def _last_layer(recipe: Recipe) -> tuple[str, ...]:
    """The names of its weight and bias."""
    return head_tensor_names(HeadKind.HIDDEN if recipe.hidden else HeadKind.LINEAR)[-2:]


def _add_prefixes(tensors: dict[str, Tensor], model: TaskModel, frozen: Frozen) -> list[dict[str, object]]:
    """Add the prefix tensors as they are stored, and return the manifest's entries for them."""
    vectors = [prefix.vectors for prefix in frozen.prefixes]
    entries = list(frozen.entries)
    if model.prefix is not None:
        own = model.prefix.detach().cpu()
        vectors, first_layer = [own], model.recipe.first_layer
        entries = [{"num_virtual_tokens": own.shape[3], "first_layer": first_layer}]
    completed: list[dict[str, object]] = []
    for index, (entry, vector) in enumerate(zip(entries, vectors, strict=True)):
        flat = flatten_prefix(vector).to(writer.STORED)
        tensors[PROMPT if len(vectors) == 1 else f"{PROMPT}.{index}"] = flat
        first = entry["first_layer"]
        assert isinstance(first, int)
        completed.append(dict(entry) | {"digest": prefix_digest(flat, first)})
    return completed


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(
    folder: Path, learned: Learned, exact: Backbone, tokenizer: TextTokenizer, watcher: Watcher
) -> dict[str, Any]:
    """Write the tensors, measure what is read back, and write the manifest last: without it nothing is loadable."""
    tables = learned.tables
    manifest = _manifest(learned, exact.spec)
    # A regression's last layer holds the data's own units, which may be large and close together.
    in_units = _last_layer(learned.recipe) if tables.train.problem_type is ProblemType.REGRESSION else ()
    writer.write_tensors(folder, learned.tensors, exact=in_units)
    artifact = build_artifact(manifest, writer.read_tensors(folder), exact.spec, "draft", folder.name)
    with evaluation.running(exact) as engine:
        measured = {name: table for name, table in tables.named.items() if name != "train"}
        watcher.stage("measuring", sum(len(table.examples) for table in measured.values()))
        scored = {}
        for name, table in measured.items():
            scored[name] = evaluation.score(engine, tokenizer, artifact, table)
            watcher.advance(len(table.examples))
        thresholds = evaluation.tuned_thresholds(scored["dev"], tables.labels)
        manifest |= {
            "thresholds": thresholds,
            "evaluation": {n: evaluation.figures(s, tables.labels, thresholds) for n, s in scored.items()}
            | {"measure": MEASURES[tables.train.problem_type]},
            "score_baseline": evaluation.score_baseline(scored["dev"], tables.labels),
            "golden": evaluation.golden_examples(engine, tokenizer, artifact, tables.dev),
        }
        writer.write_peft_config(folder, manifest, exact.spec)
        writer.write_manifest(folder, manifest)
        written = read_artifact(folder, exact.spec)
        engine.load(written)
        _check(check_golden(engine, tokenizer, written), written)
    return manifest


def _check(difference: float | None, artifact: Artifact) -> None:
    if difference is not None and difference > _MAX_GOLDEN_DIFFERENCE:
        raise ArtifactError(artifact.manifest["task"], [f"read back, its golden scores differ by {difference:.1e}"])


def _manifest(learned: Learned, spec: BackboneSpec) -> dict[str, Any]:
    recipe, tables = learned.recipe, learned.tables
    readout = recipe.reads
    head: Mapping[str, str] = (
        {"kind": HeadKind.HIDDEN, "activation": recipe.activation} if recipe.hidden else {"kind": HeadKind.LINEAR}
    )
    return {
        "format_version": FORMAT_VERSION,
        "task": recipe.task,
        "problem_type": tables.train.problem_type,
        "labels": list(tables.labels),
        "thresholds": [],
        "input": tables.train.input_kind,
        "readout": {"kind": readout.kind, "layers": list(readout.layers)}
        | ({"num_queries": readout.num_queries} if readout.num_queries else {}),
        "head": head,
        "prefixes": learned.prefixes,
        "position_offset": learned.position_offset,
        "backbone": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_heads,
        },
        "training": recipe.settings() | {"best_epoch": learned.best.number},
        "data": {
            name: {"file": table.name, "sha256": table.sha256, "rows": len(table.examples)}
            for name, table in tables.named.items()
        },
    }
