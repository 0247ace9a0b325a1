"""One task from files to an artifact: read, choose, train, calibrate, write, measure by the engine, move into place.

Knows the order of things; each step is another module's. Draws nothing: it reports to a `Watcher`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from app.domain import BackboneSpec, HeadKind, ProblemType, TextInput
from app.engine.artifact import Artifact, flatten_prefix
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, prefix_digest
from app.engine.backbone import Backbone
from app.engine.chain import TRANSITIONS
from app.engine.engine import Engine
from app.engine.heads import head_tensor_names
from app.engine.tokenizer import TextTokenizer
from app.errors import DataError, SettingsError, TokenizationError
from app.learning import evaluation, reporting, writer
from app.learning.baselines import stated_baselines
from app.learning.calibration import fit_temperature
from app.learning.chain import Chain
from app.learning.compose import compose
from app.learning.data import Table, read_inputs
from app.learning.evaluation import Scored
from app.learning.finetune import FinetuneSettings
from app.learning.measured import Draft, write_measured
from app.learning.prepare import cache_plan, described, limit_tokens, read_frozen, told_of_truncated
from app.learning.problems import Scaling
from app.learning.recipe import Recipe, epochs_for
from app.learning.search import Arrangement, Candidate, Found, Point, candidates, passes_of, refinements, search
from app.learning.splits import findings, subsample
from app.learning.study import Files, Fitted, Study, Tables, Watcher

__all__ = ["Files", "Options", "Watcher", "learn"]

_SEARCH_ROWS = 4000  # more are not needed to tell arrangements apart
_SEARCH_DEV_ROWS = 2000
_LEAST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Options:
    """What is done beside fitting the recipe."""

    problem_type: ProblemType | None = None  # where the columns do not say it
    arrangements: tuple[Arrangement, ...] = ()  # to choose from; none: the recipe as it is
    given: frozenset[str] = frozenset()  # fields of the recipe that a search must leave as they are
    pool: tuple[Path, ...] = ()  # artifacts whose prefixes may be combined
    compose: bool = False  # choose among tuples of the pool's prefixes instead
    tolerance: float = 0.005  # of dev score that a cheaper arrangement may lose
    baselines: bool = False  # the cheap ones
    earlier: Mapping[str, Any] | None = None  # manifest of a version, whose baselines stand where the rows are the same
    finetuning: FinetuneSettings | None = None  # of the whole backbone, as the ceiling
    raise_epochs: bool = False  # where rows are few, for enough steps
    golden: Path | None = None  # inputs for the golden examples; None: rows of dev
    command: str = ""  # as it was typed, for the report


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of train and dev: (how many, of how many)."""

    train: tuple[int, int]
    dev: tuple[int, int]

    def __str__(self) -> str:
        parts = (f"{rows:,} of {total:,} rows of {name}" for name, (rows, total) in asdict(self).items())
        return f"a sample: {' and '.join(parts)}"


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A fitted task with what is needed to write it."""

    study: Study
    fitted: Fitted
    tensors: dict[str, Tensor]
    prefixes: list[dict[str, object]]
    temperature: float
    found: Found | None  # the search that chose it
    was_interrupted: bool  # by the user; this is the best until then
    sample: Sample | None = None  # that the search ran on; None: on all rows
    seconds: float = 0.0  # of the frozen layers' passes and all fits

    @property
    def recipe(self) -> Recipe:
        return self.fitted.recipe

    @property
    def tables(self) -> Tables:
        return self.study.tables

    @property
    def limit_tokens(self) -> int:
        """Of a text; what is longer is read in part."""
        return self.study.backbone.spec.max_tokens - self.fitted.position_offset


def learn(
    recipe: Recipe,
    files: Files,
    out: Path,
    backbones: tuple[Backbone, Backbone],
    watcher: Watcher,
    options: Options | None = None,
) -> dict[str, Any]:
    """Learn a task and write its artifact to `out`. `backbones`: one to train on, one in float32 to measure with.

    Returns the manifest. Raises a ManifoldError; whatever happens, `out` is never half written.
    """
    options = options or Options()
    if not options.tolerance >= 0:
        raise SettingsError("--tolerance is out of range: give points of the dev score, 0 or more")
    writer.check_out(out.absolute())
    replaced = writer.check_owner(out, recipe.task)
    backbone, exact = backbones
    tokenizer = TextTokenizer(backbone.path)
    tables = Tables.read(files, options.problem_type, recipe.seed, tokenizer)
    study = Study(tables, backbone, tokenizer, watcher)
    golden = read_inputs(options.golden, tables.train.input_kind) if options.golden is not None else []
    noticed = findings(tables.named, tables.whole)
    watcher.notice([*replaced, *noticed.sentences()])
    study.completed(recipe)  # what cannot work is told before anything is tried
    limit = limit_tokens(backbone.spec, cache_plan(recipe, read_frozen(recipe, backbone.spec)))
    watcher.notice(told_of_truncated(tables.named.values(), limit))
    _check_readable(tokenizer, golden, options.golden, backbone.spec)
    if options.raise_epochs:
        recipe = with_enough_steps(recipe, len(tables.train.examples))
    began = time.perf_counter()
    if options.arrangements or options.compose:
        learned = _choose(recipe, study, options)
    else:
        completed = study.completed(recipe)
        study.prepare([completed])  # and no more: what baselines read comes when the task is there
        watcher.stage("training", study.num_looks(recipe))
        learned = _finish(study, study.fit(completed))
    learned = replace(learned, seconds=time.perf_counter() - began)
    baselines = _stated(options.earlier or {}, learned)
    if (options.baselines or options.finetuning) and not learned.was_interrupted:
        found, was_interrupted = reporting.baselines(study, recipe, options.baselines, options.finetuning)
        learned = replace(learned, was_interrupted=was_interrupted)
        baselines |= {name: baseline.figures for name, baseline in found.items()}

    def write(learned: Learned, measured: Mapping[str, Table]) -> dict[str, Any]:
        with writer.new_folder(out) as folder:
            manifest, scored = _write(folder, learned, exact, watcher, measured, baselines, golden)
            reporting.write(folder, manifest, _story(folder, learned, scored, noticed.sentences(), options))
        return manifest

    try:
        return write(learned, {name: table for name, table in tables.named.items() if name != "train"})
    except KeyboardInterrupt:
        watcher.notice(
            ["interrupted: the task is written with the figures of dev alone; another interrupt abandons it"]
        )
    return write(replace(learned, was_interrupted=True), {"dev": tables.dev})


def _stated(earlier: Mapping[str, Any], learned: Learned) -> dict[str, Any]:
    """The seed says which rows a dev part has that is split off."""
    same_seed = (earlier.get("training") or {}).get("seed") == learned.recipe.seed
    return stated_baselines(earlier, _data(learned)) if same_seed else {}


def _check_readable(tokenizer: TextTokenizer, golden: list[TextInput], name: Path | None, spec: BackboneSpec) -> None:
    """Raise DataError for a golden input that the model cannot read, before anything is trained."""
    try:
        tokenizer.encode(golden, [spec.max_tokens] * len(golden), truncate=True)
    except TokenizationError as error:
        raise DataError(f"{name}: {error}") from error


def _choose(recipe: Recipe, study: Study, options: Options) -> Learned:
    """Search on at most _SEARCH_ROWS rows; what is chosen is then trained on all of them.

    A user's interrupt ends all of it, with the best that is there.
    """
    part, sample = _sampled(study, recipe.seed)
    if sample is not None:
        study.watcher.notice([f"the search runs on {sample}; what it chooses is then trained on all of them"])
    return replace(_searched(recipe, study, part, options), sample=sample)


def _sampled(study: Study, seed: int) -> tuple[Study, Sample | None]:
    """What the search runs on: the study itself where it is small enough."""
    tables = study.tables
    num_train, num_dev = len(tables.train.examples), len(tables.dev.examples)
    if num_train <= _SEARCH_ROWS and num_dev <= _SEARCH_DEV_ROWS:
        return study, None
    train, dev = subsample(tables.train, _SEARCH_ROWS, seed), subsample(tables.dev, _SEARCH_DEV_ROWS, seed)
    part = Study(replace(tables, train=train, dev=dev), study.backbone, study.tokenizer, study.watcher)
    return part, Sample((len(train.examples), num_train), (len(dev.examples), num_dev))


def _searched(recipe: Recipe, study: Study, part: Study, options: Options) -> Learned:
    watcher = study.watcher
    if options.compose:
        watcher.stage("compositions", 0)
        found = compose(part, recipe, options.pool, options.tolerance, watcher.candidate)
    else:
        tried = candidates(recipe, part, options.arrangements, options.pool, options.given)
        watcher.stage("arrangements", len(tried))
        found = search(part, tried, options.tolerance, watcher.candidate)
    if not found.was_interrupted:
        found = _refine(part, found, options, watcher)
    if part is study or found.was_interrupted:
        return _finish(part, found.fitted, found)
    recipe = replace(found.candidate.recipe, epochs=recipe.epochs)
    try:
        study.prepare([recipe])
        watcher.stage("training on all rows", study.num_looks(recipe))
        return _finish(study, study.fit(recipe), found)
    except KeyboardInterrupt:
        return _finish(part, found.fitted, replace(found, was_interrupted=True))


def with_enough_steps(recipe: Recipe, rows: int, steps: int | None = None) -> Recipe:
    """Few rows are gone through more often, for so many `steps` at least (None: _LEAST_STEPS)."""
    epochs = epochs_for(_LEAST_STEPS if steps is None else steps, rows, recipe.batch_size)
    if epochs <= recipe.epochs:
        return recipe
    return replace(recipe, epochs=epochs, patience=recipe.patience * -(-epochs // recipe.epochs))


def _refine(study: Study, found: Found, options: Options, watcher: Watcher) -> Found:
    """The chosen arrangement with other rates and sizes; the best on dev is kept."""
    chosen = found.candidate
    others = [Candidate(name, recipe, chosen.passes) for name, recipe in refinements(chosen, study, options.given)]
    if not others:
        return found
    watcher.stage("settings", len(others))
    try:
        tried = search(study, others, 0.0, watcher.candidate)
    except KeyboardInterrupt:
        return replace(found, was_interrupted=True)
    if tried.fitted.best.quality <= found.fitted.best.quality:
        rest = (replace(point, chosen=False) for point in tried.points)
        return replace(found, points=(*found.points, *rest), was_interrupted=tried.was_interrupted)
    before = (replace(point, chosen=False) for point in found.points)
    return replace(tried, points=(*before, *tried.points))


def _finish(study: Study, fitted: Fitted, found: Found | None = None) -> Learned:
    """The model's tensors as they are stored: calibrated, in the data's own units, prefixes beside them."""
    kind = study.tables.problem_type
    tensors = fitted.model.tensors()
    (temperature, transitions), was_interrupted = _calibrated(study, fitted)
    _scale_logits(tensors, fitted.recipe, 1 / temperature)
    if transitions is not None:
        tensors[TRANSITIONS] = transitions
    if kind is ProblemType.REGRESSION:
        _fold(tensors, fitted.recipe, study.scaling)
    prefixes = _add_prefixes(tensors, fitted)
    was_interrupted |= fitted.was_interrupted or (found is not None and found.was_interrupted)
    return Learned(study, fitted, tensors, prefixes, temperature, found, was_interrupted)


def _calibrated(study: Study, fitted: Fitted) -> tuple[tuple[float, Tensor | None], bool]:
    """What dev says of the outputs, and whether the user interrupted it: seconds of work, which a first interrupt
    begins anew."""
    try:
        return _tuned(study, fitted), False
    except KeyboardInterrupt:
        return _tuned(study, fitted), True


def _tuned(study: Study, fitted: Fitted) -> tuple[float, Tensor | None]:
    """The temperature, and of tags the transitions."""
    logits, targets = study.logits(fitted, "dev")
    temperature = fit_temperature(study.tables.problem_type, logits, targets)
    if study.tables.problem_type is not ProblemType.TOKEN:
        return temperature, None
    chain = Chain.of(study.tagged(fitted, "train"), study.tables.labels)
    return temperature, chain.tuned(logits / temperature, study.tagged(fitted, "dev"))


def _scale_logits(tensors: dict[str, Tensor], recipe: Recipe, factor: float) -> None:
    for name in _last_layer(recipe):
        tensors[name] = tensors[name] * factor


def _fold(tensors: dict[str, Tensor], recipe: Recipe, scaling: Scaling) -> None:
    """Let the last layer answer in the data's own units."""
    weight, bias = _last_layer(recipe)
    tensors[weight] = tensors[weight] * scaling.std
    tensors[bias] = tensors[bias] * scaling.std + scaling.mean


def _last_layer(recipe: Recipe) -> tuple[str, ...]:
    """The names of its weight and bias."""
    return head_tensor_names(HeadKind.HIDDEN if recipe.hidden else HeadKind.LINEAR)[-2:]


def _add_prefixes(tensors: dict[str, Tensor], fitted: Fitted) -> list[dict[str, object]]:
    """Add the prefix tensors as they are stored, and return the manifest's entries for them."""
    vectors = [prefix.vectors for prefix in fitted.frozen.prefixes]
    entries = list(fitted.frozen.entries)
    if fitted.model.prefix is not None:
        own = fitted.model.prefix.detach().cpu()
        vectors, first_layer = [own], fitted.recipe.first_layer
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
    folder: Path,
    learned: Learned,
    exact: Backbone,
    watcher: Watcher,
    measured: Mapping[str, Table],
    baselines: Mapping[str, Any],
    golden: list[TextInput],
) -> tuple[dict[str, Any], dict[str, Scored]]:
    """Write the artifact with what the engine measures of it on `measured`: dev, and test where it is wanted.

    Returns the manifest, and what these tables got.
    """
    tables, scored = learned.tables, dict[str, Scored]()

    def measure(engine: Engine, tokenizer: TextTokenizer, artifact: Artifact) -> dict[str, Any]:
        watcher.stage("measuring", sum(len(table.examples) for table in measured.values()))
        for name, table in measured.items():
            scored[name] = evaluation.score(engine, tokenizer, artifact, table)
            watcher.advance(len(table.examples))
        thresholds = evaluation.tuned_thresholds(scored["dev"], tables.labels)
        return {
            "thresholds": thresholds,
            "evaluation": {n: evaluation.figures(s, tables.labels, thresholds) for n, s in scored.items()}
            | {"measure": learned.recipe.measure},
            "details": {n: evaluation.details(s, tables.labels, thresholds) for n, s in scored.items()},
            "baselines": dict(baselines),
            "score_baseline": evaluation.score_baseline(
                artifact.version(0), scored["dev"], tokenizer.unknown_id, thresholds
            ),
            "golden": evaluation.golden_of(engine, tokenizer, artifact, golden)
            if golden
            else evaluation.golden_examples(engine, tokenizer, artifact, tables.dev),
        }

    # A regression's last layer holds the data's own units, which may be large and close together.
    in_units = _last_layer(learned.recipe) if tables.problem_type is ProblemType.REGRESSION else ()
    draft = Draft(_manifest(learned, exact.spec), learned.tensors)
    return write_measured(folder, draft, exact, measure, in_units), scored


def _story(
    folder: Path, learned: Learned, scored: Mapping[str, Scored], noticed: Sequence[str], options: Options
) -> reporting.Story:
    return reporting.Story(
        tables=learned.tables,
        fitted=learned.fitted,
        found=learned.found,
        scored=scored,
        findings=[*noticed, *told_of_truncated(learned.tables.named.values(), learned.limit_tokens)],
        command=options.command,
        tolerance=options.tolerance,
        sample="" if learned.sample is None else f"The search ran on {learned.sample}.",
        training_s=learned.seconds,
        size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
    )


def _point(point: Point) -> dict[str, Any]:
    """Without its seconds: the same seed writes the same manifest."""
    return {"name": point.name, "passes": round(point.passes, 4), "dev": round(point.dev, 5), "chosen": point.chosen}


def _manifest(learned: Learned, spec: BackboneSpec) -> dict[str, Any]:
    recipe, tables = learned.recipe, learned.tables
    readout = recipe.reads
    top = readout.layers[-1]
    head: Mapping[str, str] = (
        {"kind": HeadKind.HIDDEN, "activation": recipe.activation} if recipe.hidden else {"kind": HeadKind.LINEAR}
    )
    return {
        "format_version": FORMAT_VERSION,
        "task": recipe.task,
        "problem_type": tables.problem_type,
        "labels": list(tables.labels),
        "thresholds": [],
        "input": tables.train.input_kind,
        "readout": {"kind": readout.kind, "layers": list(readout.layers)}
        | ({"num_queries": readout.num_queries} if readout.num_queries else {})
        | ({"num_members": readout.num_members} if readout.num_members > 1 else {}),
        "head": head,
        "prefixes": learned.prefixes,
        "position_offset": learned.fitted.position_offset,
        "backbone": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_heads,
        },
        "cost": {"passes": round(passes_of(recipe, spec), 4), "passes_alone": round(top / spec.num_layers, 4)},
        "training": recipe.settings()
        | {
            "best_epoch": learned.fitted.best.number,
            "temperature": round(learned.temperature, 4),
            "interrupted": learned.was_interrupted,
        },
        "search": [] if learned.found is None else [_point(point) for point in learned.found.points],
        "search_sample": {} if learned.sample is None else {n: rows for n, (rows, _) in asdict(learned.sample).items()},
        "data": _data(learned),
    }


def _data(learned: Learned) -> dict[str, Any]:
    return {name: described(table, learned.limit_tokens) for name, table in learned.tables.named.items()}
