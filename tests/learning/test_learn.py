"""Learning end to end on a tiny backbone: it learns, it writes what it measured, and nothing half-made is left."""

from __future__ import annotations

import errno
import html
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertForSequenceClassification

from app.domain import ProblemType, ReadoutKind, TextInput
from app.engine.artifact import Artifact, read_artifact
from app.engine.backbone import Backbone
from app.engine.golden import check_golden, predict
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError, DataError, SettingsError
from app.learning import evaluation, reporting
from app.learning.combine import recipe_of
from app.learning.data import read_table
from app.learning.finetune import FinetuneSettings
from app.learning.learn import Files, Options, learn
from app.learning.prepare import cache_plan, encode
from app.learning.recipe import Recipe
from app.learning.study import Study, Tables
from app.learning.trainer import Epoch
from tests.learning import samples


class Silent:
    """A watcher that may interrupt."""

    def __init__(self, interrupt_in: str | None = None) -> None:
        self._interrupt_in = interrupt_in
        self.stages: list[str] = []
        self.candidates: list[tuple[str, float]] = []
        self.noticed: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)
        if name == self._interrupt_in:
            raise KeyboardInterrupt

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None:
        self.candidates.append((name, passes))

    def notice(self, sentences: Sequence[str]) -> None:
        self.noticed += sentences


HEAD = "base_model.classifier"
Rows = Callable[[random.Random, int], Sequence[Sequence[str]]]
HEADERS = {
    samples.single_rows: ("text", "label"),
    samples.multi_rows: ("text", "labels"),
    samples.regression_rows: ("text", "score"),
    samples.pair_rows: ("text_a", "text_b", "label"),
}


def files_of(folder: Path, rows: Rows, count: int = 300) -> Files:
    source = random.Random(0)
    train, dev, test = (
        samples.write_rows(folder / f"{name}.tsv", HEADERS[rows], rows(source, size))
        for name, size in (("train", count), ("dev", 60), ("test", 60))
    )
    return Files(train, dev, test)


def tagged_files(folder: Path) -> Files:
    source = random.Random(0)
    paths = [folder / f"{name}.jsonl" for name in ("train", "dev", "test")]
    for path, count in zip(paths, (300, 60, 60), strict=True):
        path.write_text("\n".join(samples.tagged_lines(source, count)))
    return Files(*paths)


def recipe(**changes: Any) -> Recipe:
    return Recipe(
        **(
            {"task": "mine", "epochs": 25, "batch_size": 16, "hidden": 16, "learning_rate": 5e-3, "dropout": 0.1}
            | changes
        )
    )


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, {"num_virtual_tokens", "first_layer", "prefix_learning_rate", "num_members"}),
        ({"num_members": 2}, {"num_virtual_tokens", "first_layer", "prefix_learning_rate"}),
        (
            {"readout": ReadoutKind.MEAN, "hidden": 0, "num_virtual_tokens": 2, "first_layer": 1},
            {"num_queries", "query_learning_rate", "activation", "num_members"},
        ),
    ],
)
def test_a_report_is_told_the_settings_that_are_of_use(
    changes: dict[str, Any], idle: set[str], tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(tmp_path, samples.single_rows, 40)
    study = Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())
    completed = study.completed(recipe(**changes))
    assert completed.settings().keys() - completed.applying().keys() == idle
    told: dict[str, Any] = {}
    monkeypatch.setattr(reporting, "render", lambda report: told.update(report) or "")
    learn(recipe(epochs=1, **changes), files, tmp_path / "out", (backbone, backbone), Silent())
    assert told["recipe"].keys() - {"prefixes"} == completed.settings().keys() - idle


def learned(folder: Path, files: Files, backbone: Backbone, **changes: Any) -> dict[str, Any]:
    """The manifest, read back through the engine's own checks."""
    out = folder / "out"
    manifest = learn(recipe(**changes), files, out, (backbone, backbone), Silent())
    assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    return manifest


# -- every problem type ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (samples.single_rows, {}),
        (samples.single_rows, {"readout": ReadoutKind.MEAN, "hidden": 0, "epochs": 30, "learning_rate": 5e-2}),
        (samples.single_rows, {"num_virtual_tokens": 4, "first_layer": 1, "epochs": 8}),
        (samples.single_rows, {"num_members": 3}),
        (samples.multi_rows, {}),
        (samples.multi_rows, {"num_members": 2, "class_weight_power": 0.3}),
        (samples.regression_rows, {"num_members": 2, "epochs": 15}),
        (samples.regression_rows, {"epochs": 15}),
        (samples.pair_rows, {}),
        (samples.pair_rows, {"num_virtual_tokens": 4, "first_layer": 1, "read_layers": (1, 3), "epochs": 8}),
        (samples.pair_rows, {"readout": ReadoutKind.ATTENTION}),
        (samples.pair_rows, {"num_members": 2, "num_virtual_tokens": 4, "first_layer": 1, "epochs": 8}),
    ],
    ids=[
        *("single", "mean", "late-fork", "averaged", "multi", "multi-averaged", "regression-averaged", "regression"),
        *("pair", "pair-late-fork", "pair-attention", "pair-averaged"),
    ],
)
def test_it_learns_and_serves_with_the_scores_that_it_states(
    tmp_path: Path, backbone: Backbone, rows: Rows, changes: dict[str, Any]
) -> None:
    files = files_of(tmp_path, rows)
    manifest = learned(tmp_path, files, backbone, **changes)
    assert manifest["evaluation"]["test"][manifest["evaluation"]["measure"]] > 0.8
    usual = ReadoutKind.MATCHING if rows is samples.pair_rows else ReadoutKind.ATTENTION
    assert manifest["readout"]["kind"] == changes.get("readout", usual)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    tokenizer = TextTokenizer(backbone.path)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        assert check_golden(engine, tokenizer, artifact) < 1e-4
        scored = evaluation.score(engine, tokenizer, artifact, read_table(files.test))
    figures = evaluation.figures(scored, manifest["labels"], manifest["thresholds"])
    assert figures == manifest["evaluation"]["test"]


def test_members_are_learned_apart_and_are_averaged(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, 60)
    study = Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())
    fitted = study.fit(study.completed(recipe(num_members=3, num_queries=2, epochs=2)))
    model, cache = fitted.model, study.split(cache_plan(fitted.recipe, fitted.frozen), "dev").cache
    batch = cache.gather(torch.arange(7))
    model.dropout.p = 0.0
    apart, together = model.train()(cache, batch), model.eval()(cache, batch)
    assert apart.shape == (3, 7, 3)
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert torch.allclose(apart.mean(dim=0), together, atol=1e-5)
    tensors = model.tensors()
    alone = study.fit(study.completed(recipe(num_queries=2, epochs=1))).model
    for member, logits in enumerate(apart):  # each is a readout of its own
        alone.load_state_dict({
            "queries": tensors["queries"][:, 2 * member : 2 * member + 2],
            "dense.weight": tensors[f"{HEAD}.dense.weight"].chunk(3)[member],
            "dense.bias": tensors[f"{HEAD}.dense.bias"].chunk(3)[member],
            "out.weight": 3 * tensors[f"{HEAD}.out_proj.weight"].chunk(3, dim=1)[member],
            "out.bias": tensors[f"{HEAD}.out_proj.bias"],
        })  # fmt: skip
        assert torch.allclose(alone.eval()(cache, batch), logits, atol=1e-5)


def test_a_head_with_members_is_fitted_again_as_it_was(tmp_path: Path, backbone: Backbone) -> None:
    learned(tmp_path, files_of(tmp_path, samples.single_rows, 40), backbone, num_members=2, num_queries=3, epochs=1)
    again = recipe_of(read_artifact(tmp_path / "out", backbone.spec), ())
    assert (again.num_members, again.num_queries, again.hidden) == (2, 3, 16)


def test_one_text_has_nothing_to_be_matched_with(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, 40)
    with pytest.raises(SettingsError, match="--readout matching compares the texts of a pair"):
        learn(recipe(readout=ReadoutKind.MATCHING), files, tmp_path / "out", (backbone, backbone), Silent())
    assert not (tmp_path / "out").exists()


def test_it_learns_to_tag_tokens(tmp_path: Path, backbone: Backbone) -> None:
    manifest = learned(tmp_path, tagged_files(tmp_path), backbone, hidden=32)
    assert manifest["labels"] == ["O", "B-city", "I-city", "B-name", "I-name"]
    assert manifest["readout"]["kind"] == "tokens"
    assert manifest["evaluation"]["test"]["f1"] > 0.9
    assert sum(map(sum, manifest["score_baseline"]["counts"])) == manifest["score_baseline"]["texts"] == 60
    assert len(manifest["score_baseline"]["labels"]) == 3  # city, name, none


def test_tags_follow_one_another_as_they_may(tmp_path: Path, backbone: Backbone) -> None:
    """Of a head that has learned next to nothing: the highest tag of each word alone would break the rules."""
    learned(tmp_path, tagged_files(tmp_path), backbone, epochs=1, hidden=0, learning_rate=1e-6)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    assert artifact.tensors["transitions"].shape == (6, 5)
    labels, found = artifact.manifest["labels"], dict[str, list[list[str]]]()
    with evaluation.running(backbone) as engine:
        table, tokenizer = read_table(tmp_path / "test.jsonl"), TextTokenizer(backbone.path)
        plain = replace(artifact, digest="sha256:" + "0" * 64, tensors=_without_transitions(artifact))
        for name, one in (("chain", artifact), ("plain", plain)):
            scored = evaluation.score(engine, tokenizer, one, table)
            found[name] = [
                [labels[output.tags[token]] for token in encoding.first_tokens]
                for encoding, output in zip(scored.encodings, scored.outputs, strict=True)
            ]
    assert any(map(_breaks_bio, found["plain"])) and not any(map(_breaks_bio, found["chain"]))


def test_wrong_tags_are_among_the_worst_mistakes(tmp_path: Path, backbone: Backbone) -> None:
    files = tagged_files(tmp_path)
    assert files.test is not None
    first, *rest = files.test.read_text().splitlines()
    words = json.loads(first)["tokens"]
    odd = {"tokens": words, "tags": ["B-city", *["I-city"] * (len(words) - 1)]}  # as no training row has it
    files.test.write_text("\n".join([json.dumps(odd), *rest]))
    learned(tmp_path, files, backbone, hidden=32)
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert f"city: {' '.join(words)}" in page.partition("Worst mistakes")[2]


def _without_transitions(artifact: Artifact) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in artifact.tensors.items() if name != "transitions"}


def _breaks_bio(tags: list[str]) -> bool:
    return any(tag[0] == "I" and before[2:] != tag[2:] for before, tag in pairwise(["O", *tags]))


def test_weights_for_rare_labels_leave_the_probabilities_honest(tmp_path: Path, backbone: Backbone) -> None:
    """A label that one text in ten has, whatever it says: with its weight alone it would be given with one in two."""

    def rows(source: random.Random, count: int) -> list[tuple[str, str]]:
        return [(source.choice(samples.GOOD), "rare" if i % 10 == 0 else "usual") for i in range(count)]

    files = [
        samples.write_rows(tmp_path / f"{name}.tsv", ("text", "labels"), rows(random.Random(i), 300))
        for i, name in enumerate(("train", "dev"))
    ]
    changes = {"class_weight_power": 1.0, "epochs": 10, "learning_rate": 1e-2}
    manifest = learned(tmp_path, Files(*files), backbone, **changes)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        texts = [TextInput(word) for word in samples.GOOD]
        outputs = predict(engine, TextTokenizer(backbone.path), artifact, texts)
    rare = manifest["labels"].index("rare")
    assert sum(output.scores[rare] for output in outputs) / len(outputs) == pytest.approx(0.1, abs=0.06)


def test_regression_answers_in_the_units_of_the_data(tmp_path: Path, backbone: Backbone) -> None:
    learned(tmp_path, files_of(tmp_path, samples.regression_rows), backbone, epochs=15)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        texts = [TextInput("good fine great nice"), TextInput("bad poor awful grim")]
        high, low = (o.scores[0] for o in predict(engine, TextTokenizer(backbone.path), artifact, texts))
    assert high == pytest.approx(140, abs=8) and low == pytest.approx(100, abs=8)


def test_labels_as_numbers_can_be_a_regression(tmp_path: Path, backbone: Backbone) -> None:
    source = random.Random(0)
    rows = [
        samples.write_rows(tmp_path / f"{n}.tsv", ("text", "label"), samples.regression_rows(source, 40)) for n in "ab"
    ]
    out = tmp_path / "out"
    options = Options(problem_type=ProblemType.REGRESSION)
    manifest = learn(recipe(epochs=1), Files(*rows), out, (backbone, backbone), Silent(), options)
    assert manifest["labels"] == [] and set(manifest["evaluation"]) == {"dev", "measure"}


def test_all_of_the_training_file_is_looked_at_where_dev_is_a_part_of_it(tmp_path: Path, backbone: Backbone) -> None:
    train = files_of(tmp_path, samples.single_rows, count=60).train
    (tmp_path / "same.tsv").write_text(train.read_text())
    watcher = Silent()
    learn(recipe(epochs=1), Files(train, None, tmp_path / "same.tsv"), tmp_path / "out", (backbone, backbone), watcher)
    assert watcher.noticed[0].startswith("60 of 60 texts of same.tsv also stand in train.tsv")


def test_offsets_are_kept_only_where_tokens_are_tagged(tmp_path: Path, backbone: Backbone) -> None:
    tokenizer = TextTokenizer(backbone.path)
    for name, files in (("plain", files_of(tmp_path, samples.single_rows, 40)), ("tags", tagged_files(tmp_path))):
        learn(recipe(epochs=1), files, tmp_path / name, (backbone, backbone), Silent())
        table, is_token = read_table(files.dev), name == "tags"
        with evaluation.running(backbone) as engine:
            scored = evaluation.score(engine, tokenizer, read_artifact(tmp_path / name, backbone.spec), table)
        for encodings in (scored.encodings, encode(tokenizer, table, 64)):
            assert all(bool(e.offsets) == bool(e.word_ids) == is_token for e in encodings)


# -- the artifact ------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_it_was_made_of(tmp_path: Path, backbone: Backbone) -> None:
    manifest = learned(tmp_path, files_of(tmp_path, samples.multi_rows), backbone, epochs=2)
    assert manifest["labels"] == ["city", "name"] and len(manifest["thresholds"]) == 2
    assert manifest["backbone"]["fingerprint"] == backbone.spec.fingerprint
    assert manifest["data"]["train"]["file"] == "train.tsv" and manifest["data"]["dev"]["rows"] == 60
    assert len(manifest["golden"]) == 8
    assert [sum(counts) for counts in manifest["score_baseline"]["counts"]] == [60, 60]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert not list(tmp_path.glob(".out*"))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        changes = {"epochs": 2, "seed": seed, "num_virtual_tokens": 3, "first_layer": 2}
        learn(recipe(**changes), files, folder, (backbone, backbone), Silent())
    first, same, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert first == same != other
    assert (folders[0] / "manifest.json").read_bytes() == (folders[1] / "manifest.json").read_bytes()


def test_combined_prefixes_are_taken_over_as_they_are(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows)
    for name, first_layer in (("one", 1), ("two", 2)):
        changes = {"task": name, "epochs": 1, "num_virtual_tokens": 3, "first_layer": first_layer}
        learn(recipe(**changes), files, tmp_path / name, (backbone, backbone), Silent())
    manifest = learned(tmp_path, files, backbone, prefixes=(tmp_path / "two", tmp_path / "one"))
    own = [json.loads((tmp_path / name / "manifest.json").read_text())["prefixes"][0] for name in ("two", "one")]
    assert [p["digest"] for p in manifest["prefixes"]] == [p["digest"] for p in own]
    assert [p["task"] for p in manifest["prefixes"]] == ["two", "one"]
    assert manifest["evaluation"]["test"]["accuracy"] > 0.8
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_peft_reads_a_full_prefix_and_gives_the_same_logits(tmp_path: Path, backbone: Backbone) -> None:
    changes = {"readout": ReadoutKind.POOLER, "hidden": 0, "num_virtual_tokens": 4, "first_layer": 0, "epochs": 2}
    manifest = learned(tmp_path, files_of(tmp_path, samples.single_rows), backbone, **changes)
    assert manifest["position_offset"] == 4
    base = BertForSequenceClassification.from_pretrained(backbone.path, num_labels=3)
    oracle = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    text = TextInput("we was good in it")
    tokenizer = TextTokenizer(backbone.path)
    (encoding,) = tokenizer.encode([text], [60], truncate=False)
    with torch.no_grad():
        expected = oracle(
            input_ids=torch.tensor([encoding.input_ids]), attention_mask=torch.ones(1, len(encoding)).long()
        ).logits.softmax(-1)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        (output,) = predict(engine, tokenizer, artifact, [text])
    assert output.scores == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_an_artifact_is_replaced_and_nothing_else_is(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    learned(tmp_path, files, backbone, epochs=1)
    watcher = Silent()
    learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher)
    assert f"{tmp_path / 'out'} holds mine already, which is replaced at the end" in watcher.noticed
    with pytest.raises(SettingsError, match='is an artifact of "mine": name a folder of its own with --out'):
        learned(tmp_path, files, backbone, epochs=1, task="other")
    (tmp_path / "out" / "thoughts.txt").write_text("deep")
    with pytest.raises(SettingsError, match=r"holds thoughts\.txt, which is of no artifact"):
        learned(tmp_path, files, backbone, epochs=1)
    assert (tmp_path / "out" / "thoughts.txt").read_text() == "deep"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("dear")
    with pytest.raises(SettingsError, match="is no artifact"):
        learn(recipe(), files, tmp_path / "notes", (backbone, backbone), Silent())
    assert (tmp_path / "notes" / "diary").read_text() == "dear"


def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path: Path, backbone: Backbone) -> None:
    files, watcher = files_of(tmp_path, samples.single_rows, count=40), Silent()
    with pytest.raises(SettingsError, match=r"train\.tsv cannot be written: .*name another folder with --out"):
        learn(recipe(), files, tmp_path / "train.tsv" / "out", (backbone, backbone), watcher)
    assert watcher.stages == []


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["frozen layers, dev", "training"])
def test_an_interrupted_run_leaves_nothing_loadable(tmp_path: Path, backbone: Backbone, stage: str) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    with pytest.raises(KeyboardInterrupt):
        learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Silent(stage))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.tsv", "test.tsv", "train.tsv"]


class Impatient(Silent):
    """Interrupts in one stage, the first times that it begins."""

    def __init__(self, stage: str, times: int) -> None:
        super().__init__()
        self._stage, self._times = stage, times

    def stage(self, name: str, total: int) -> None:
        super().stage(name, total)
        if name == self._stage and self.stages.count(name) <= self._times:
            raise KeyboardInterrupt


def test_an_interrupt_while_measuring_keeps_what_was_learned(tmp_path: Path, backbone: Backbone) -> None:
    files, watcher = files_of(tmp_path, samples.single_rows, count=40), Impatient("measuring", times=1)
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher)
    assert manifest["evaluation"].keys() == {"dev", "measure"} and manifest["training"]["interrupted"] is True
    assert "another interrupt abandons it" in watcher.noticed[-1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Measuring was interrupted" in page and "There is no test set" not in page
    read_artifact(tmp_path / "out", backbone.spec)


def test_a_second_interrupt_while_measuring_abandons_it(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    with pytest.raises(KeyboardInterrupt):
        learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), Impatient("measuring", times=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.tsv", "test.tsv", "train.tsv"]


def test_an_interrupt_while_calibrating_keeps_what_was_learned(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> float:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("app.learning.learn.fit_temperature", interrupted)
    files = files_of(tmp_path, samples.single_rows, count=40)
    manifest = learned(tmp_path, files, backbone, epochs=1)
    assert manifest["training"]["interrupted"] is True and "test" in manifest["evaluation"]
    monkeypatch.undo()
    again = learn(recipe(epochs=1), files, tmp_path / "again", (backbone, backbone), Silent())
    assert manifest["training"]["temperature"] == again["training"]["temperature"]


@pytest.mark.parametrize(
    ("fails", "error", "kept"),
    [
        ("_linear", KeyboardInterrupt(), {"majority", "tfidf"}),
        ("_linear", RuntimeError("it broke\nat some line"), {"majority", "tfidf", "full fine-tuning"}),
        (
            "_full",
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
            {"majority", "tfidf", "linear head on the bare trunk"},
        ),
    ],
    ids=["interrupt", "error", "memory"],
)
def test_a_baseline_that_ends_early_takes_nothing_with_it(
    tmp_path: Path,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    error: BaseException,
    kept: set[str],
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(reporting, fails, failing)
    watcher, options = Silent(), Options(baselines=True, finetuning=FinetuneSettings(epochs=1))
    files = files_of(tmp_path, samples.single_rows, count=40)
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher, options)
    assert set(manifest["baselines"]) == kept
    is_interrupt = isinstance(error, KeyboardInterrupt)
    assert manifest["training"]["interrupted"] is is_interrupt
    if not is_interrupt:
        told = f"failed and is left out: {type(error).__name__}: {str(error).splitlines()[0]}"
        assert watcher.noticed[-1].endswith(told)
    read_artifact(tmp_path / "out", backbone.spec)


def test_a_full_disk_is_told_with_what_to_do(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.learning.writer.write_manifest", full)
    with pytest.raises(
        DataError, match=r"cannot be written to .*: No space left on device; make room there, or .*--out"
    ):
        learned(tmp_path, files_of(tmp_path, samples.single_rows, count=40), backbone, epochs=1)
    assert not (tmp_path / "out").exists()


def test_a_draft_without_its_manifest_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    learned(tmp_path, files_of(tmp_path, samples.single_rows, count=40), backbone, epochs=1)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="neither"):
        read_artifact(tmp_path / "out", backbone.spec)


def test_texts_without_anything_to_read_are_left_out_and_told(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    for path in (files.train, files.dev, files.test):
        with path.open("a") as file:
            file.write("\x01\x02\tgood\n\tgood\n\u200b\tgood\n")
    watcher = Silent()
    manifest = learn(recipe(epochs=1), files, tmp_path / "out", (backbone, backbone), watcher)
    assert [data["rows"] for data in manifest["data"].values()] == [40, 60, 60]
    assert watcher.noticed[:2] == [
        f"3 rows of {name} cannot be read and are left out (the first: line {line} has nothing that the model can "
        "read): correct or delete them"
        for name, line in (("train.tsv", 42), ("dev.tsv", 62))
    ]


@pytest.mark.parametrize(("changes", "limit"), [({}, 64), ({"num_virtual_tokens": 4}, 60)], ids=["bare", "prefix"])
def test_texts_that_are_read_in_part_are_told(
    tmp_path: Path, backbone: Backbone, changes: dict[str, Any], limit: int
) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    for path, texts in ((files.train, [60, 59, 58]), (files.test, [64, 63])):
        with path.open("a") as file:
            file.write("".join(f"{'good ' * words}\tgood\n" for words in texts))
    watcher = Silent()
    manifest = learn(recipe(epochs=1, **changes), files, tmp_path / "out", (backbone, backbone), watcher)
    train = sum(words + 2 > limit for words in (60, 59, 58))
    assert [data["truncated"] for data in manifest["data"].values()] == [train, 0, 2]
    told = f"2 of 62 texts of test.tsv are longer than {limit} tokens: only their beginning is read; the service "
    told = (f"{train} of 43 texts of train.tsv, " if train else "") + told
    assert sum(sentence.startswith(told) for sentence in watcher.noticed) == 1
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert told in page and 'unless a request says "truncate": true' in page


def test_a_table_of_which_too_little_can_be_read(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    files.dev.write_text("text\tlabel\n" + "good\tgood\n" * 7 + "\x01\tgood\n" * 3)
    with pytest.raises(DataError, match=r"3 of the 10 rows of dev\.tsv cannot be read, .*: line 9 has nothing that"):
        learn(recipe(), files, tmp_path / "out", (backbone, backbone), Silent())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"read_layers": (2, 9)}, "--read-layers must rise from 1 to 3"),
        ({"readout": ReadoutKind.TOKENS}, "need --readout tokens"),
        ({"readout": ReadoutKind.POOLER, "read_layers": (2,)}, "a pooler reads layer 3 alone"),
        ({"num_virtual_tokens": 4, "first_layer": 3}, "--first-layer must be in 0 … 2"),
        ({"num_virtual_tokens": 4, "first_layer": 2, "read_layers": (1, 2)}, "nothing reads above"),
        ({"num_virtual_tokens": 4, "prefixes": (Path("x"),)}, "give one of them"),
        ({"num_members": 2, "hidden": 0}, "--num-members averages readouts that have queries and a hidden"),
        ({"num_members": 2, "readout": ReadoutKind.MEAN}, "--num-members averages readouts that have queries"),
        ({"num_members": 0}, "--num-members is out of range: give 1 to 16"),
        ({"task": "Über"}, "--task must be a name"),
        ({"epochs": 0}, "--epochs is out of range: give 1 or more"),
        ({"dropout": 1.0}, "--dropout is out of range: give 0 or more and less than 1"),
        ({"learning_rate": float("nan")}, "--learning-rate is out of range: give more than 0"),
    ],
)
def test_choices_that_cannot_work(tmp_path: Path, backbone: Backbone, changes: dict[str, Any], sentence: str) -> None:
    files = files_of(tmp_path, samples.single_rows, count=10)
    with pytest.raises(SettingsError, match=sentence):
        learn(recipe(**changes), files, tmp_path / "out", (backbone, backbone), Silent())


def test_prefixes_of_an_artifact_that_has_none(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=40)
    learned(tmp_path, files, backbone, epochs=1)
    with pytest.raises(SettingsError, match="has no prefix"):
        learn(recipe(prefixes=(tmp_path / "out",)), files, tmp_path / "b", (backbone, backbone), Silent())


def test_the_engine_agrees_with_the_training_pass(tmp_path: Path, backbone: Backbone) -> None:
    """The best epoch's dev figure, from cached states, is the one that the engine measures."""
    figures: list[Epoch] = []
    watcher = Silent()
    watcher.epoch = lambda epoch, measure: figures.append(epoch)  # type: ignore[method-assign]
    files = files_of(tmp_path, samples.single_rows)
    manifest = learn(
        recipe(epochs=3, num_virtual_tokens=2, first_layer=1), files, tmp_path / "out", (backbone, backbone), watcher
    )
    best = max(epoch.dev for epoch in figures)
    assert manifest["evaluation"]["dev"]["accuracy"] == pytest.approx(best, abs=0.02)


def test_a_regression_far_from_zero_keeps_its_units(tmp_path: Path, backbone: Backbone) -> None:
    """In half precision 200,000 is infinite, and near 2,000 values are two apart."""
    files = files_of(tmp_path, samples.regression_rows)
    for path in (files.train, files.dev, files.test):
        assert path is not None
        header, *rows = path.read_text().splitlines()
        moved = (f"{text}\t{200_000 + float(score) / 100}" for text, score in (row.split("\t") for row in rows))
        path.write_text("\n".join((header, *moved)) + "\n")
    learned(tmp_path, files, backbone)
    artifact = read_artifact(tmp_path / "out", backbone.spec)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        (output,) = predict(engine, TextTokenizer(backbone.path), artifact, [TextInput("good fine great nice")])
    assert output.scores[0] == pytest.approx(200_001.4, abs=0.1)
