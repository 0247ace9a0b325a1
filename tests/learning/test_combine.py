"""Representations: one row for all that reads them, served as they were written, and replaced with their heads."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain import ProblemType, ReadoutKind, TextInput
from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.engine.golden import check_golden, predict
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError, SettingsError
from app.learning import combine_command, evaluation
from app.learning.combine import combine, update
from app.learning.data import read_table
from app.learning.learn import Files, learn
from app.learning.prepare import encode
from app.learning.recipe import Recipe
from app.learning.rows import LayerPrefix, positions, run_layers
from app.learning.trainer import Epoch
from tests.learning import samples


class Silent:
    """A watcher that may interrupt."""

    def __init__(self, interrupt_in: str | None = None) -> None:
        self._interrupt_in = interrupt_in
        self.noticed: list[str] = []

    def stage(self, name: str, total: int) -> None:
        if name == self._interrupt_in:
            raise KeyboardInterrupt

    def advance(self, steps: int) -> None: ...

    def epoch(self, epoch: Epoch, measure: str) -> None: ...

    def candidate(self, name: str, passes: float, dev: float, seconds: float) -> None: ...

    def notice(self, sentences: Sequence[str]) -> None:
        self.noticed += sentences


@dataclass(frozen=True)
class World:
    """Artifacts with prefixes, a representation of two of them, and heads."""

    root: Path
    files: Files

    def __truediv__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> World:
    root = tmp_path_factory.mktemp("world")
    source = random.Random(0)
    paths = (
        samples.write_rows(root / f"{name}.tsv", ("text", "label"), samples.single_rows(source, count))
        for name, count in (("train", 200), ("dev", 60), ("test", 60))
    )
    files = Files(*paths)
    world = World(root, files)
    for index, (name, first_layer) in enumerate((("one", 1), ("two", 0), ("three", 2))):
        own = {"num_virtual_tokens": 3, "first_layer": first_layer, "seed": index, "patience": 1}
        fit(world, backbone, root / name, task=name, **own)
    combine("both", [root / "two", root / "one"], root / "both", backbone)
    fit(world, backbone, root / "mood", task="mood", prefixes=(root / "both",))
    fit(world, backbone, root / "trunk", task="trunk", patience=1)
    (root / "apart").mkdir()
    shutil.copytree(root / "trunk", root / "apart" / "trunk")
    (root / "tasks.toml").write_text(
        "[defaults]\nepochs = 3\n[tasks.mood]\ntrain = 'train.tsv'\ndev = 'dev.tsv'\ntest = 'test.tsv'\n"
    )
    return world


def fit(world: World, backbone: Backbone, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"epochs": 30, "batch_size": 32, "hidden": 16, "learning_rate": 1e-2, "dropout": 0.1, "patience": 3}
    return learn(Recipe(**(settings | changes)), world.files, out, (backbone, backbone), Silent())


def replaced(world: World, backbone: Backbone, out: Path, old: str = "one", **changes: Any) -> dict[str, Any]:
    given = {
        "representation": world / "both",
        "replace": (old, world / "three"),
        "heads": [world / "mood"],
        "files": {"mood": world.files},
        "watcher": Silent(),
    }
    return update(**(given | changes), out=out, backbones=(backbone, backbone))


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def digests(folder: Path) -> list[str]:
    return [prefix["digest"] for prefix in manifest_of(folder)["prefixes"]]


# -- a representation --------------------------------------------------------------------------------------------------


def test_it_holds_the_prefixes_in_order_under_their_own_digests(world: World) -> None:
    manifest = manifest_of(world / "both")
    assert [prefix["task"] for prefix in manifest["prefixes"]] == ["two", "one"]
    assert digests(world / "both") == digests(world / "two") + digests(world / "one")
    assert manifest["problem_type"] == "embedding" and manifest["position_offset"] == 3
    assert manifest["readout"] == {"kind": "mean", "layers": [3]} and len(manifest["golden"]) == 4
    assert str(world.root) not in json.dumps(manifest)


def test_its_vector_is_the_mean_of_a_row_that_sees_all_prefixes(world: World, backbone: Backbone) -> None:
    artifact, text = read_artifact(world / "both", backbone.spec), TextInput("we was good in it")
    tokenizer = TextTokenizer(backbone.path)
    with evaluation.running(backbone) as engine:
        engine.load(artifact)
        (output,) = predict(engine, tokenizer, artifact, [text])
    (encoding,) = tokenizer.encode([text], [60], truncate=False)
    ids = torch.tensor([encoding.input_ids])
    prefixes = [
        LayerPrefix(entry["first_layer"], vectors.float())
        for entry, vectors in zip(artifact.manifest["prefixes"], artifact.prefix_vectors, strict=True)
    ]
    mask = torch.ones(1, len(encoding), dtype=torch.bool)
    with torch.no_grad():
        states = backbone.embed(ids, torch.zeros_like(ids), positions(backbone, ids, 3))
        *_, (_, states) = run_layers(backbone, states, mask, range(3), prefixes, 3)
    expected = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)[0]
    assert output.scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_it_and_its_head_load_with_the_golden_scores_that_they_state(world: World, backbone: Backbone) -> None:
    tokenizer = TextTokenizer(backbone.path)
    with evaluation.running(backbone) as engine:
        for name in ("both", "mood"):
            artifact = read_artifact(world / name, backbone.spec)
            assert artifact.manifest["task"] == name
            engine.load(artifact)
            difference = check_golden(engine, tokenizer, artifact)
            assert difference is not None and difference < 1e-4
    assert read_artifact(world / "both", backbone.spec).manifest["problem_type"] == ProblemType.EMBEDDING


def test_a_head_shares_its_row(world: World, backbone: Backbone) -> None:
    representation, head = (read_artifact(world / name, backbone.spec).version(1) for name in ("both", "mood"))
    assert head.prefixes == representation.prefixes
    table = read_table(world / "dev.tsv")
    encoding = encode(TextTokenizer(backbone.path), table, 50)[0]
    plan = make_plan(encoding, [representation, head], backbone.spec.num_layers)
    assert len(plan.rows) == 1 and plan.passes == 1.0
    assert manifest_of(world / "mood")["evaluation"]["test"]["accuracy"] > 0.8


def test_readout_and_layers_can_be_given(world: World, backbone: Backbone, tmp_path: Path) -> None:
    manifest = combine("cls", [world / "one"], tmp_path / "out", backbone, ReadoutKind.CLS, (2, 3))
    assert manifest["readout"] == {"kind": "cls", "layers": [2, 3]}
    assert len(manifest["golden"][0]["scores"]) == 2 * backbone.spec.hidden_size


@pytest.mark.parametrize(
    ("name", "folders", "changes", "sentence"),
    [
        ("Über", ["one"], {}, "--name must be a name"),
        ("tiny", ["one"], {}, "the backbone's own representation"),
        ("new", [], {}, "nothing to combine"),
        ("new", ["one", "trunk"], {}, "has no prefix"),
        ("new", ["one", "both"], {}, "one and one hold the same prefix"),
        ("new", ["one", "three"], {"read_layers": (2,)}, "three begins at layer 2, and the readout ends at 2"),
        ("new", ["one"], {"read_layers": (4,)}, "--read-layers must rise from 1 to 3"),
        ("new", ["one"], {"readout": ReadoutKind.ATTENTION}, "--readout must be one of mean, cls, pooler"),
    ],
)
def test_what_cannot_stand_side_by_side(
    world: World,
    backbone: Backbone,
    tmp_path: Path,
    name: str,
    folders: list[str],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        combine(name, [world / folder for folder in folders], tmp_path / "out", backbone, **changes)
    assert not list(tmp_path.iterdir())


def test_prefixes_of_another_backbone(world: World, tmp_path: Path, backbone: Backbone) -> None:
    manifest = manifest_of(world / "one")
    manifest["backbone"]["fingerprint"] = "sha256:other"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes((world / "one/adapter_model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="fingerprint sha256:other"):
        combine("new", [tmp_path / "one"], tmp_path / "out", backbone)
    assert not (tmp_path / "out").exists()


# -- its next version --------------------------------------------------------------------------------------------------


def test_a_prefix_is_replaced_and_its_heads_are_fitted_again(world: World, backbone: Backbone, tmp_path: Path) -> None:
    changes = replaced(world, backbone, tmp_path / "out")
    assert digests(tmp_path / "out/both") == digests(world / "two") + digests(world / "three")
    assert digests(tmp_path / "out/mood") == digests(tmp_path / "out/both")
    assert changes == json.loads((tmp_path / "out/changes.json").read_text())
    assert (changes["replaced"]["task"], changes["by"]["task"]) == ("one", "three")
    before, after = manifest_of(world / "mood"), manifest_of(tmp_path / "out/mood")
    for split in ("dev", "test"):
        stated = {"before": before["evaluation"][split], "after": after["evaluation"][split]}
        assert changes["heads"]["mood"][split] == stated
    assert changes["heads"]["mood"]["test"]["after"]["accuracy"] > 0.8
    settings = [m["training"] | {"best_epoch": 0, "temperature": 0} for m in (before, after)]
    assert settings[0] == settings[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_baselines_stay_where_the_rows_are_the_same(world: World, backbone: Backbone, tmp_path: Path) -> None:
    """They know nothing of prefixes."""
    shutil.copytree(world / "mood", tmp_path / "mood")
    stated = {"majority": {"dev": {"accuracy": 0.5, "rows": 60}, "test": {"accuracy": 0.4, "rows": 60}}}
    (tmp_path / "mood/manifest.json").write_text(json.dumps(manifest_of(world / "mood") | {"baselines": stated}))
    given = {"heads": [tmp_path / "mood"]}
    replaced(world, backbone, tmp_path / "same", **given)
    assert manifest_of(tmp_path / "same/mood")["baselines"] == stated
    assert "Against the baselines" in (tmp_path / "same/mood/report.html").read_text()
    other = Files(world.files.train, world.files.test, world.files.dev)
    replaced(world, backbone, tmp_path / "other", files={"mood": other}, **given)
    assert manifest_of(tmp_path / "other/mood")["baselines"] == {}


def test_the_heads_in_a_folder_are_those_that_read_it(world: World, backbone: Backbone, tmp_path: Path) -> None:
    shutil.copytree(world.root, tmp_path / "served")
    (tmp_path / "served" / "trunk" / "manifest.json").write_text("{")
    watcher = Silent()
    changes = replaced(world, backbone, tmp_path / "out", heads=[tmp_path / "served"], watcher=watcher)
    assert list(changes["heads"]) == ["mood"]
    (left_out,) = (sentence for sentence in watcher.noticed if "is left out" in sentence)
    assert "served/trunk" in left_out
    assert digests(tmp_path / "out/mood") == digests(tmp_path / "out/both")


def test_of_a_tasks_versions_the_newest_is_its_head(world: World, backbone: Backbone, tmp_path: Path) -> None:
    for number, name in ((2, "trunk"), (10, "mood")):
        shutil.copytree(world / name, tmp_path / "served" / "mood" / str(number))
    for heads in (tmp_path / "served", tmp_path / "served" / "mood"):
        changes = replaced(world, backbone, tmp_path / heads.name / "out", heads=[heads])
        assert list(changes["heads"]) == ["mood"]
        shutil.rmtree(tmp_path / heads.name / "out")


def test_a_prefix_can_be_named_by_its_digest(world: World, backbone: Backbone, tmp_path: Path) -> None:
    (digest,) = digests(world / "two")
    changes = replaced(world, backbone, tmp_path / "out", digest, heads=[])
    assert changes["replaced"]["task"] == "two" and changes["heads"] == {}
    assert manifest_of(tmp_path / "out/both")["position_offset"] == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"old": "four"}, '"four" is none of the prefixes of both: give a digest of two'),
        ({"representation": "mood"}, "is a task, no representation"),
        ({"replace": ("one", "both")}, "has 2 prefixes: name an artifact with one"),
        ({"replace": ("one", "trunk")}, "has no prefix"),
        ({"replace": ("one", "one")}, "nothing would change"),
        ({"replace": ("one", "two")}, "two and two hold the same prefix"),
        ({"heads": ["one"]}, "does not read the prefixes of both"),
        ({"heads": ["trunk"]}, "does not read the prefixes of both"),
        ({"heads": ["both"]}, "is a representation, no head"),
        ({"heads": ["mood", "mood"]}, 'called "mood"'),
        ({"heads": ["apart"]}, "no artifact in .*apart reads both"),
        ({"files": {}}, r"add \[tasks.mood\]"),
    ],
)
def test_updates_that_cannot_work(
    world: World, backbone: Backbone, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    given = dict(changes)
    if "representation" in given:
        given["representation"] = world / given["representation"]
    if "replace" in given:
        old, new = given["replace"]
        given["replace"] = (old, world / new)
    if "heads" in given:
        given["heads"] = [world / name for name in given["heads"]]
    with pytest.raises(SettingsError, match=sentence):
        replaced(world, backbone, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_an_update_never_takes_the_place_of_an_artifact(world: World, backbone: Backbone) -> None:
    with pytest.raises(SettingsError, match="both is an artifact, and several will be written"):
        replaced(world, backbone, world / "both")
    assert (world / "both" / "manifest.json").is_file()


def test_data_of_another_task_is_refused(world: World, backbone: Backbone, tmp_path: Path) -> None:
    source = random.Random(0)
    rows = [(text, label) for text, label in samples.single_rows(source, 60) if label != "city"]
    path = samples.write_rows(tmp_path / "two.tsv", ("text", "label"), rows)
    with pytest.raises(SettingsError, match=r"two.tsv has not the labels of mood \(city\)"):
        replaced(world, backbone, tmp_path / "out", files={"mood": Files(path, path)})
    assert [found.name for found in tmp_path.iterdir()] == ["two.tsv"]


def test_an_interrupted_update_leaves_nothing(world: World, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        replaced(world, backbone, tmp_path / "out", watcher=Silent("measuring"))
    assert not list(tmp_path.iterdir())


# -- as it is typed ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    combine_command.add_arguments(parser)
    return combine_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_combines_and_updates(
    world: World, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = ("--model", model_path, "--dtype", "float32")
    assert run("--name", "pair", "--out", tmp_path / "pair", *machine, world / "two", world / "one") == 0
    assert "pair: " in capsys.readouterr().out
    change = ("--replace", f"one={world / 'three'}", "--heads", world / "mood", "--config", world / "tasks.toml")
    assert run("--update", tmp_path / "pair", *change, "--out", tmp_path / "next", *machine) == 0
    shown = capsys.readouterr().out
    assert "before" in shown and "mood" in shown and "changes.json" in shown
    assert digests(tmp_path / "next/mood") == digests(tmp_path / "next/pair")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--out", "x", "a"), "--name must be given"),
        (("--out", "x", "--name", "n", "a", "--replace", "a=b"), "go with --update"),
        (("--out", "x", "--update", "r", "--name", "n"), "leave out --name"),
        (("--out", "x", "--update", "r"), "--replace OLD=DIR must be given"),
        (("--out", "x", "--update", "r", "--replace", "a=b", "--heads", "h"), "--config must be given"),
    ],
)
def test_what_is_wrong_is_one_sentence_on_stderr(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("manifold combine: ") and sentence in error and error.count("\n") == 1
