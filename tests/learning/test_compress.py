"""Compression: fewer virtual tokens that still answer as well, or nothing at all."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.domain import TextInput
from app.engine.artifact import Artifact, read_artifact
from app.engine.artifact_checks import prefix_digest
from app.engine.backbone import Backbone
from app.engine.golden import check_golden
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError, SettingsError
from app.learning import compress_command, evaluation
from app.learning.cache import CachePlan
from app.learning.combine import combine
from app.learning.compress import Step, attention_mass, compress
from app.learning.data import read_table
from app.learning.learn import Files, learn
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix
from app.learning.trainer import Epoch
from tests.learning import samples
from tests.learning.test_report import Page

TENSORS = "adapter_model.safetensors"


class Silent:
    """A watcher that may interrupt."""

    def __init__(self, interrupt_in: str | None = None) -> None:
        self._interrupt_in = interrupt_in

    def stage(self, name: str, total: int) -> None:
        if name == self._interrupt_in:
            raise KeyboardInterrupt

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None: ...

    def notice(self, sentences: Sequence[str]) -> None: ...


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    """`full` and `late`, with eight virtual tokens each, and what cannot be compressed."""
    root = tmp_path_factory.mktemp("artifacts")
    source = random.Random(0)
    for name, count in (("train", 200), ("dev", 60), ("test", 60)):
        samples.write_rows(root / f"{name}.tsv", ("text", "label"), samples.single_rows(source, count))
    own = {"num_virtual_tokens": 8}
    fit(root, backbone, "full", **own, first_layer=0)
    fit(root, backbone, "late", **own, first_layer=1)
    fit(root, backbone, "trunk")
    combine("both", [root / "full", root / "late"], root / "both", backbone)
    write_changed(root / "late", root / "guest", 1.0, "guest", owner="late")
    return root


def fit(root: Path, backbone: Backbone, name: str, **changes: Any) -> None:
    settings = {
        "epochs": 8,
        "batch_size": 32,
        "hidden": 16,
        "learning_rate": 5e-3,
        "prefix_learning_rate": 1e-2,
        "dropout": 0.1,
        "patience": 0,
        "task": name,
    }
    learn(Recipe(**(settings | changes)), files_in(root), root / name, (backbone, backbone), Silent())


def files_in(root: Path) -> Files:
    return Files(root / "train.tsv", root / "dev.tsv", root / "test.tsv")


def compressed(root: Path, name: str, out: Path, backbone: Backbone, **changes: Any) -> dict[str, Any]:
    return compress(root / name, files_in(root), out, (backbone, backbone), Silent(), **changes)


def check_page(html: str, manifest: dict[str, Any], steps: Sequence[Step]) -> None:
    """Every size that was tried, which was chosen, and what it loses."""
    page, before = Page(html), steps[0]
    count, head = manifest["prefixes"][0]["num_virtual_tokens"], manifest["compressed"]["head"]
    chosen = next(s for s in steps[1:] if (s.num_virtual_tokens, s.head) == (count, head))
    assert {"Quality against size", "What is taken for what", "How it was made"} <= set(page.headings)
    for step in steps:
        assert f"{step.num_virtual_tokens} {step.dev:.3f} " in page.text
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "tr"].count("own") == 1
    assert f"Its prefix was compressed, 8 virtual tokens, {before.size_bytes / 1e3:.0f} kB to " in page.text
    assert f"with the head {head} (dev accuracy {chosen.dev:.3f}, against {before.dev:.3f} before: " in page.text
    assert f"accuracy is {manifest['evaluation']['test']['accuracy']:.3f}." in page.text


# -- what it writes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens"), [("full", None), ("late", 4)])
def test_fewer_tokens_hold_the_score_and_serve_with_the_scores_stated(
    root: Path, backbone: Backbone, tmp_path: Path, name: str, tokens: int | None
) -> None:
    steps: list[Step] = []
    options = {"tolerance": 0.02, "tokens": tokens, "report": steps.append}
    manifest = compressed(root, name, tmp_path / "out", backbone, **options)
    original = read_artifact(root / name, backbone.spec)
    assert original.manifest["evaluation"]["dev"]["accuracy"] == pytest.approx(steps[0].dev)
    assert manifest["evaluation"]["dev"]["accuracy"] >= steps[0].dev - 0.02
    (prefix,) = manifest["prefixes"]
    assert prefix["num_virtual_tokens"] < 8 and "task" not in prefix
    assert manifest["position_offset"] == (prefix["num_virtual_tokens"] if name == "full" else 0)
    check_page((tmp_path / "out" / "report.html").read_text(), manifest, steps)
    tried = [6, 6, 4, 4, 3, 3, 2, 2, 1, 1] if tokens is None else [tokens, tokens]
    assert [step.num_virtual_tokens for step in steps] == [8, *tried]
    artifact, tokenizer = read_artifact(tmp_path / "out", backbone.spec), TextTokenizer(backbone.path)
    assert json.loads(json.dumps(manifest)) == artifact.manifest
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        difference = check_golden(engine, tokenizer, artifact)
        scored = evaluation.score(engine, tokenizer, artifact, read_table(root / "test.tsv"))
    assert difference is not None and difference < 1e-4
    assert evaluation.figures(scored, manifest["labels"]) == manifest["evaluation"]["test"]


def test_the_manifest_says_what_it_came_from_and_what_was_lost(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    compressed(root, "full", tmp_path / "out", backbone, tokens=3, tolerance=1.0)
    original = read_artifact(root / "full", backbone.spec)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    story = manifest["compressed"]
    assert story["from"] == original.digest
    assert story["from_prefix"] == original.manifest["prefixes"][0]["digest"]
    assert story["before"]["test"] == original.manifest["evaluation"]["test"]
    lost = story["before"]["dev"]["accuracy"] - manifest["evaluation"]["dev"]["accuracy"]
    assert story["lost"] == pytest.approx(lost, abs=1e-4)
    assert [(step["num_virtual_tokens"], step["head"]) for step in story["curve"]] == [
        (8, "as it was"),
        (3, "as it was"),
        (3, "fitted again"),
    ]
    assert story["curve"][1]["size_bytes"] < story["curve"][0]["size_bytes"]
    assert manifest["data"]["test"]["rows"] == 60 and manifest["data"]["test"]["truncated"] == 0
    assert (tmp_path / "out/adapter_config.json").is_file()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["num_virtual_tokens"] == 3
    assert str(root) not in json.dumps(manifest)


def test_baselines_stay_where_the_rows_are_the_same(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    shutil.copytree(root / "full", tmp_path / "full")
    manifest = json.loads((root / "full/manifest.json").read_text())
    stated = {"majority": {"dev": {"accuracy": 0.5, "rows": 60}}}
    (tmp_path / "full/manifest.json").write_text(json.dumps(manifest | {"baselines": stated}))
    for name in ("train", "dev", "test"):
        shutil.copy(root / f"{name}.tsv", tmp_path)
    smaller = {"tokens": 3, "tolerance": 1.0}
    assert compressed(tmp_path, "full", tmp_path / "same", backbone, **smaller)["baselines"] == stated
    shutil.copy(root / "test.tsv", tmp_path / "dev.tsv")
    assert compressed(tmp_path, "full", tmp_path / "other", backbone, **smaller)["baselines"] == {}


def test_without_dev_rows_of_its_own_only_the_part_that_the_task_did_not_see_will_do(
    root: Path, backbone: Backbone, tmp_path: Path
) -> None:
    files = Files(root / "train.tsv", None, root / "test.tsv")
    given = (tmp_path / "out", (backbone, backbone), Silent())
    with pytest.raises(SettingsError, match="--dev must be given: late was not learned from a part of"):
        compress(root / "late", files, *given)
    settings = {"epochs": 3, "hidden": 16, "learning_rate": 5e-3, "num_virtual_tokens": 4, "first_layer": 1, "seed": 5}
    learn(Recipe("split", **settings), files, tmp_path / "split", (backbone, backbone), Silent())
    manifest = compress(tmp_path / "split", files, *given, tolerance=1.0, tokens=2)
    stated = json.loads((tmp_path / "split" / "manifest.json").read_text())
    assert manifest["data"]["dev"] == stated["data"]["dev"]
    assert manifest["compressed"]["before"]["dev"] == stated["evaluation"]["dev"]


def test_a_prefix_in_full_precision_is_halved(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    source = write_changed(root / "late", tmp_path / "late", 1.0, "late")
    manifest = compress(source, files_in(root), tmp_path / "out", (backbone, backbone), Silent(), tokens=8)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / TENSORS).values()} == {torch.float16}
    assert manifest["compressed"]["lost"] <= 0.005


def write_changed(source: Path, target: Path, factor: float, task: str, owner: str | None = None) -> Path:
    """A copy in full precision under another name, its prefix multiplied."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / TENSORS).items()}
    tensors["prompt_embeddings"] *= factor
    manifest = json.loads((source / "manifest.json").read_text()) | {"task": task}
    manifest["prefixes"][0]["digest"] = prefix_digest(tensors["prompt_embeddings"], 1)
    manifest["prefixes"][0] |= {} if owner is None else {"task": owner}
    target.mkdir(exist_ok=True)
    save_file(tensors, target / TENSORS)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


# -- which tokens go ---------------------------------------------------------------------------------------------------


def test_tokens_that_nothing_attends_to_go_first(root: Path, backbone: Backbone) -> None:
    artifact = read_artifact(root / "late", backbone.spec)
    vectors = artifact.prefix_vectors[0].float().clone()
    vectors[:, 1, :, [2, 5]] = 0.0  # values that add nothing, however much they are attended to
    mass = mass_of(backbone, artifact, vectors, ["we was good", "the of a in bad to and we it is was good fine"])
    assert set(mass.argsort()[:2].tolist()) == {2, 5} and (mass[[0, 1, 3, 4, 6, 7]] > 0).all()


def test_a_text_counts_as_often_as_it_stands_there(root: Path, backbone: Backbone) -> None:
    artifact = read_artifact(root / "late", backbone.spec)
    vectors = artifact.prefix_vectors[0].float()
    one, other = (mass_of(backbone, artifact, vectors, [text]) for text in ("we was good", "the of a in bad"))
    both = mass_of(backbone, artifact, vectors, ["we was good"] * 9 + ["the of a in bad"])
    torch.testing.assert_close(both, 9 * one + other, rtol=1e-4, atol=1e-6)


def test_padding_takes_no_part(root: Path, backbone: Backbone) -> None:
    artifact = read_artifact(root / "late", backbone.spec)
    vectors = artifact.prefix_vectors[0].float()
    texts = ["we was good", "the of a in bad to and we it is was good fine"]
    apart = sum((mass_of(backbone, artifact, vectors, [text]) for text in texts), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(mass_of(backbone, artifact, vectors, texts), apart, rtol=1e-4, atol=1e-6)


def mass_of(backbone: Backbone, artifact: Artifact, vectors: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    inputs = [TextInput(text) for text in texts]
    encodings = TextTokenizer(backbone.path).encode(inputs, [60] * len(inputs), truncate=False)
    prefix = LayerPrefix(artifact.manifest["prefixes"][0]["first_layer"], vectors)
    return attention_mass(backbone, encodings, CachePlan((3,), prefixes=(prefix,)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_tolerance_that_cannot_be_met_writes_nothing(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    spoiled = [(text, {"good": "bad", "bad": "city", "city": "good"}[label]) for text, label in rows_of(root)]
    train = samples.write_rows(tmp_path / "train.tsv", ("text", "label"), spoiled)
    files = Files(train, root / "dev.tsv")
    source = with_tokens_that_matter(root, backbone, tmp_path)
    with pytest.raises(SettingsError, match=r"nothing smaller stays within 0.5 points of dev accuracy 0.\d+"):
        compress(source, files, tmp_path / "out", (backbone, backbone), Silent(), tokens=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loud", "mine", "train.tsv"]


def rows_of(root: Path) -> list[tuple[str, str]]:
    lines = (root / "train.tsv").read_text().splitlines()[1:]
    return [(text, label) for text, label in (line.split("\t") for line in lines)]


def with_tokens_that_matter(root: Path, backbone: Backbone, folder: Path) -> Path:
    """A head on a prefix whose values drown the text's: without one of its tokens the states are others."""
    write_changed(root / "late", folder / "loud", 20.0, "mine")
    recipe = Recipe("mine", prefixes=(folder / "loud",), epochs=30, learning_rate=1e-2, patience=3)
    learn(recipe, files_in(root), folder / "mine", (backbone, backbone), Silent())
    return folder / "mine"


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("trunk", {}, "reads the bare trunk: it has no prefix"),
        ("both", {}, "combines prefixes"),
        ("guest", {}, "reads the prefix of late, and shares its row: compress late instead"),
        ("late", {"tokens": 8}, "--tokens must be in 1 … 7"),
        ("late", {"tokens": 0}, "--tokens must be in 1 … 7"),
        ("late", {"tolerance": -0.1}, "--tolerance is out of range"),
        ("late", {"tolerance": float("nan")}, "--tolerance is out of range"),
    ],
)
def test_what_cannot_be_compressed(
    root: Path, backbone: Backbone, tmp_path: Path, name: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        compressed(root, name, tmp_path / "out", backbone, **changes)
    assert not list(tmp_path.iterdir())


def test_the_artifact_itself_is_not_replaced(root: Path, backbone: Backbone) -> None:
    with pytest.raises(SettingsError, match="is the artifact itself: name another folder with --out"):
        compress(root / "full", files_in(root), root / "late" / ".." / "full", (backbone, backbone), Silent())


def test_a_prefix_of_another_backbone(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    manifest = json.loads((root / "late/manifest.json").read_text())
    manifest["backbone"]["fingerprint"] = "sha256:other"
    (tmp_path / "late").mkdir()
    (tmp_path / "late/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "late" / TENSORS).write_bytes((root / "late" / TENSORS).read_bytes())
    with pytest.raises(ArtifactError, match="fingerprint sha256:other"):
        compress(tmp_path / "late", files_in(root), tmp_path / "out", (backbone, backbone), Silent())


@pytest.mark.parametrize("stage", ["measuring the artifact as it is", "1 virtual tokens"])
def test_an_interrupt_before_anything_is_good_leaves_nothing(
    root: Path, backbone: Backbone, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(root / "late", files_in(root), tmp_path / "out", (backbone, backbone), Silent(stage), tokens=1)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_the_smallest_so_far(root: Path, backbone: Backbone, tmp_path: Path) -> None:
    silent, out = Silent("2 virtual tokens"), tmp_path / "out"
    manifest = compress(root / "late", files_in(root), out, (backbone, backbone), silent, tolerance=1.0)
    assert manifest["compressed"]["interrupted"] is True and manifest["prefixes"][0]["num_virtual_tokens"] == 3
    assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    read_artifact(out, backbone.spec)


# -- as it is typed ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    compress_command.add_arguments(parser)
    return compress_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prints_the_curve(
    root: Path, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [part for name in ("train", "dev", "test") for part in (f"--{name}", root / f"{name}.tsv")]
    machine = ("--model", model_path, "--dtype", "float32")
    given = (root / "late", *data, "--out", tmp_path / "out", "--tokens", 2, "--tolerance", 100, *machine)
    assert run(*given) == 0
    shown = capsys.readouterr().out
    assert "virtual tokens" in shown and "bytes" in shown and "8 → 2 virtual tokens" in shown
    assert run(root / "trunk", *data, "--out", tmp_path / "no", *machine) == 1
    error = capsys.readouterr().err
    assert error.startswith("manifold compress: ") and error.count("\n") == 1
