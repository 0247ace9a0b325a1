"""What is put beside an artifact for people: baselines on the same data, and the report.

Knows what was learned and measured; draws nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor

from app.domain import ProblemType, ReadoutKind
from app.engine.heads import scores_of
from app.learning import evaluation
from app.learning.alignment import word_starts
from app.learning.baselines import CEILING, LINEAR, Baseline, text_baselines
from app.learning.chain import Chain, decode_tags
from app.learning.data import Example
from app.learning.evaluation import Scored
from app.learning.figures import Bools, Floats
from app.learning.finetune import FinetuneSettings, Texts, finetune, whole_logits
from app.learning.recipe import Recipe
from app.learning.report import render
from app.learning.search import Found
from app.learning.steps import release_memory
from app.learning.study import Fitted, Study, Tables
from app.learning.writer import REPORT

_MAX_MISTAKES = 15


@dataclass(frozen=True, slots=True, eq=False)
class Story:
    """What the report tells beside the manifest."""

    tables: Tables
    fitted: Fitted
    found: Found | None
    scored: Mapping[str, Scored]  # by table: dev, and test where there is one
    findings: Sequence[str]
    command: str
    tolerance: float
    sample: str  # a sentence where the search ran on a part of the rows
    training_s: float  # the frozen layers' passes and all fits
    size_bytes: int


def baselines(
    study: Study, recipe: Recipe, with_cheap: bool, finetuning: FinetuneSettings | None
) -> tuple[dict[str, Baseline], bool]:
    """What a user has without a prefix or a readout: figures on dev and test, by name. As many epochs as `recipe`.

    `finetuning`: how the ceiling is trained; None: it is left out. What fails is told and left out, whatever it is: the
    task is trained by then. Also whether the user interrupted them, which leaves those that were finished.
    """
    study.watcher.stage("baselines", 0)
    found: dict[str, Baseline] = {}
    for name, work in _baselines(study, recipe, with_cheap, finetuning).items():
        try:
            found[name] = work()
        except KeyboardInterrupt:
            return found, True
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            study.watcher.notice([f"the baseline {name} failed and is left out: {type(error).__name__}: {reason}"])
        release_memory(study.backbone.device)  # what one that ran out of it held
    return found, False


def _baselines(
    study: Study, recipe: Recipe, with_cheap: bool, finetuning: FinetuneSettings | None
) -> dict[str, Callable[[], Baseline]]:
    tables = study.tables
    works: dict[str, Callable[[], Baseline]] = {}
    if with_cheap:
        works = text_baselines(tables.train, tables.dev, tables.test, tables.labels, recipe.measure)
        works[LINEAR] = partial(_linear, study, recipe)
    if finetuning is not None:
        works[CEILING] = partial(_full, study, finetuning, recipe.measure)
    return works


def write(folder: Path, manifest: Mapping[str, Any], story: Story) -> None:
    text = render(_report(manifest, story))
    (folder / REPORT).write_text(text, encoding="utf-8", errors="replace")


def write_compressed(folder: Path, manifest: Mapping[str, Any], scored: Mapping[str, Scored], command: str) -> None:
    """The page of an artifact whose manifest says under `compressed` what it was made from and what was tried."""
    story, measured = manifest["compressed"], _measured_sets(manifest)
    report = {
        "task": manifest["task"],
        "problem_type": str(manifest["problem_type"]),
        "labels": manifest["labels"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "cost": manifest.get("cost", {})
        | {"size_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.name != REPORT)},
        "figures": measured | {f"{name}, as it was": figures for name, figures in story["before"].items()},
        "measure": manifest["evaluation"]["measure"],
        "sizes": [size | {"chosen": size == _chosen_size(manifest)} for size in story["curve"]],
        "tolerance": story["tolerance"],
        "data": manifest["data"],
        "backbone": manifest["backbone"],
        "command": command,
    }
    page = render(report | _answers(manifest, scored))
    (folder / REPORT).write_text(page, encoding="utf-8", errors="replace")


def _chosen_size(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of the curve, which begins with the artifact as it was."""
    story, count = manifest["compressed"], manifest["prefixes"][0]["num_virtual_tokens"]
    tried = (size for size in story["curve"][1:] if size["num_virtual_tokens"] == count)
    return next((size for size in tried if size["head"] == story["head"]), None)


def linear_recipes(study: Study, recipe: Recipe) -> list[Recipe]:
    """A linear head on the bare trunk at two learning rates, for as many epochs as `recipe` has."""
    is_token = study.tables.problem_type is ProblemType.TOKEN
    kind = ReadoutKind.TOKENS if is_token else ReadoutKind.MEAN
    top = (study.backbone.spec.num_layers,)
    base = replace(Recipe("baseline", kind, top, hidden=0), epochs=recipe.epochs, patience=recipe.patience)
    base = replace(base, measure=recipe.measure)
    return [study.completed(replace(base, learning_rate=rate)) for rate in (1e-3, 1e-2)]


def _linear(study: Study, recipe: Recipe) -> Baseline:
    """The better on dev of its recipes."""
    fits = [study.fit(one, lambda *_: None) for one in linear_recipes(study, recipe)]
    if any(fitted.was_interrupted for fitted in fits):
        raise KeyboardInterrupt  # half a baseline is none
    best = max(fits, key=lambda fitted: fitted.best.quality)
    logits = {name: study.logits(best, name) for name in study.tables.named if name != "train"}
    return _measured(study, logits, sum(fitted.seconds for fitted in fits))


def _full(study: Study, settings: FinetuneSettings, measure: str) -> Baseline:
    texts = {name: Texts(*study.texts(name)) for name in study.tables.named}
    kind, labels, device = study.tables.problem_type, study.tables.labels, study.backbone.device
    study.watcher.stage(CEILING, settings.epochs)
    tuned = finetune(
        study.backbone.path,
        (texts["train"], texts["dev"]),
        kind,
        labels,
        settings,
        device,
        lambda *_: study.watcher.advance(1),
        study.backbone.dtype,
        measure,
    )
    logits = {name: whole_logits(tuned.model, texts[name], device)[:2] for name in texts if name != "train"}
    return _measured(study, logits, tuned.seconds)


def _measured(study: Study, logits: Mapping[str, tuple[Tensor, Tensor]], seconds: float) -> Baseline:
    """Figures of logits in the order of the tables."""
    tables, kind = study.tables, study.tables.problem_type
    transitions = _transitions(study, logits["dev"][0]) if kind is ProblemType.TOKEN else None
    scores = {name: _scores(study, name, found, transitions) for name, (found, _) in logits.items()}
    is_multi = kind is ProblemType.MULTI_LABEL
    thresholds = evaluation.thresholds_of_scores(tables.dev, scores["dev"], tables.labels) if is_multi else []
    figures = {
        name: evaluation.figures_of_scores(tables.named[name], found, tables.labels, thresholds)
        for name, found in scores.items()
    }
    return Baseline(figures, seconds)


def _transitions(study: Study, logits: Tensor) -> Tensor:
    """Chosen on these logits of dev, as those of an artifact are."""
    train, dev = (Texts(*study.texts(name)) for name in ("train", "dev"))
    return Chain.of(train.tagged, study.tables.labels).tuned(logits, dev.tagged)


def _scores(study: Study, name: str, logits: Tensor, transitions: Tensor | None) -> Any:
    """[texts, labels]; for tokens lists of tags, a text each."""
    tables, scaling = study.tables, study.scaling
    if tables.problem_type is ProblemType.REGRESSION:
        return (logits * scaling.std + scaling.mean).numpy()
    if transitions is None:
        return scores_of(tables.problem_type, logits).numpy()
    lengths = list(map(len, Texts(*study.texts(name)).tagged))
    return study.word_tags(name, decode_tags(logits, lengths, transitions))


# -- the report --------------------------------------------------------------------------------------------------------


def _report(manifest: Mapping[str, Any], story: Story) -> dict[str, Any]:
    recipe = story.fitted.recipe
    return {
        "task": manifest["task"],
        "problem_type": str(manifest["problem_type"]),
        "labels": manifest["labels"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.applying() | {"prefixes": [path.name for path in recipe.prefixes]},
        "cost": manifest["cost"] | {"size_bytes": story.size_bytes, "training_s": story.training_s},
        "figures": _measured_sets(manifest),
        "measure": manifest["evaluation"]["measure"],
        "candidates": [] if story.found is None else [_point(point) for point in story.found.points],
        "sample": story.sample,
        "tolerance": story.tolerance,
        "baselines": manifest["baselines"],
        "interrupted": manifest["training"]["interrupted"],
        "epochs": [{"number": e.number, "loss": e.loss, "dev": e.dev} for e in story.fitted.epochs],
        "findings": list(story.findings),
        "data": manifest["data"],
        "backbone": manifest["backbone"],
        "command": story.command,
    } | _answers(manifest, story.scored)


def _measured_sets(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Table → figures."""
    return {name: figures for name, figures in manifest["evaluation"].items() if isinstance(figures, dict)}


def _answers(manifest: Mapping[str, Any], scored: Mapping[str, Scored]) -> dict[str, Any]:
    """What it answered on test or, where there is none, on dev."""
    split, labels, thresholds = "test" if "test" in scored else "dev", manifest["labels"], manifest["thresholds"]
    return {
        "details": {"split": split} | evaluation.details(scored[split], labels, thresholds),
        "mistakes": _mistakes(scored[split], labels, thresholds),
    }


def _point(point: Any) -> dict[str, Any]:
    return {
        "name": point.name,
        "passes": point.passes,
        "dev": point.dev,
        "seconds": point.seconds,
        "chosen": point.chosen,
    }


def _mistakes(scored: Scored, labels: Sequence[str], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Worst first: single label by the wrong label's score, multi-label and regression by the largest error, tags by
    the highest score of a wrong one."""
    match scored.table.problem_type:
        case ProblemType.SINGLE_LABEL:
            found = scored.scores.argmax(axis=1)
            gold = evaluation.gold_of(scored.table, labels)
            sureness = np.where(found != gold, scored.scores.max(axis=1), -1.0)
            return [
                _mistake(scored.table.examples[i], labels[gold[i]], labels[found[i]], sureness[i])
                for i in _worst(sureness)
            ]
        case ProblemType.MULTI_LABEL:
            return _mistaken_sets(scored, labels, thresholds)
        case ProblemType.REGRESSION:
            errors = np.abs(scored.scores[:, 0] - evaluation.gold_of(scored.table, labels))
            return [
                _mistake(e := scored.table.examples[i], f"{e.score:g}", f"{scored.scores[i, 0]:.3g}", errors[i])
                for i in _worst(errors)
            ]
        case _:
            return _mistaken_tags(scored, labels)


def _mistaken_tags(scored: Scored, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Both as the spans that they make."""
    rows = zip(scored.table.examples, scored.encodings, scored.outputs, strict=True)
    found, sureness = evaluation.found_tags(scored, labels), []
    for (example, encoding, output), tags in zip(rows, found, strict=True):
        starts = word_starts(encoding, example.words)
        words = zip(starts, tags, example.labels, strict=True)
        wrong = [output.scores[tokens[0]] for tokens, tag, gold in words if tokens and tag != gold]
        sureness.append(max(wrong, default=-1.0))
    return [
        _mistake(e := scored.table.examples[i], _told(e.labels, e.words), _told(found[i], e.words), sureness[i])
        for i in _worst(np.array(sureness))
    ]


def _told(tags: Sequence[str], words: Sequence[str]) -> str:
    spans = get_entities(list(tags))
    return " | ".join(f"{label}: {' '.join(words[first : last + 1])}" for label, first, last in spans) or "none"


def _mistaken_sets(scored: Scored, labels: Sequence[str], thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """By the label that was missed, or found, with the largest error; its score is shown."""
    gold, found = evaluation.gold_of(scored.table, labels), scored.scores >= np.asarray(thresholds)
    errors = np.where(found != gold, np.abs(scored.scores - gold), 0.0)
    return [
        _mistake(
            scored.table.examples[i],
            _joined(gold[i], labels),
            _joined(found[i], labels),
            scored.scores[i, errors[i].argmax()],
        )
        for i in _worst(errors.max(axis=1))
    ]


def _joined(chosen: Bools, labels: Sequence[str]) -> str:
    return " | ".join(label for label, is_chosen in zip(labels, chosen, strict=True) if is_chosen) or "none"


def _worst(sizes: Floats) -> list[int]:
    order = np.argsort(-sizes, kind="stable")[:_MAX_MISTAKES]
    return [int(i) for i in order if sizes[i] > 0]


def _mistake(example: Example, gold: str, found: str, score: float) -> dict[str, Any]:
    text = example.text
    return {"text": text.text, "text_pair": text.text_pair, "gold": gold, "found": found, "score": float(score)}
