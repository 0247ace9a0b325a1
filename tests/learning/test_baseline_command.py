"""`manifold baseline`: an artifact gets what live texts are compared with, and nothing else of it changes."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.engine.artifact import read_artifact
from app.engine.backbone import Backbone
from app.errors import DataError, SettingsError
from app.learning import baseline_command
from app.learning.baseline_command import renew
from tests.artifacts import add_prefix, write_artifact
from tests.learning import samples

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, backbone: Backbone) -> Path:
    return write_artifact(tmp_path / "mine", backbone.spec, "mine", thresholds=[], notes={"größe": [1, 2.5]})


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    return samples.write_rows(tmp_path / "dev.tsv", ("text", "label"), samples.single_rows(random.Random(0), 250))


def test_the_manifest_gains_a_baseline_and_keeps_the_rest(
    folder: Path, dev: Path, model_path: Path, capsys: pytest.CaptureFixture[str], backbone: Backbone
) -> None:
    before, tensors = (
        json.loads((folder / "manifest.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    parser = argparse.ArgumentParser()
    baseline_command.add_arguments(parser)
    args = parser.parse_args([str(folder), "--data", str(dev), "--model", str(model_path), "--device", "cpu"])
    assert baseline_command.run(args) == 0
    assert "has the baseline of 250 texts" in capsys.readouterr().out
    after = json.loads((folder / "manifest.json").read_text())
    raw = after.pop("score_baseline")
    assert after == before and list(after) == list(before)
    assert raw["texts"] == 250 and sum(raw["labels"]) == 250
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_model.safetensors", "manifest.json"]
    assert all((tensors[name] == t).all() for name, t in load_file(folder / TENSORS).items())
    assert read_artifact(folder, backbone.spec).version(1).baseline is not None


def test_a_second_time_renews_it(folder: Path, dev: Path, tmp_path: Path, backbone: Backbone) -> None:
    renew(folder, dev, backbone, {})
    once = (folder / "manifest.json").read_bytes()
    renew(folder, dev, backbone, {})
    assert (folder / "manifest.json").read_bytes() == once
    (tmp_path / "texts.txt").write_text("".join(f"a good text of paris {i}\n" for i in range(200)))
    assert renew(folder, tmp_path / "texts.txt", backbone, {}) == 200
    assert json.loads((folder / "manifest.json").read_text())["score_baseline"]["texts"] == 200


def test_a_folder_from_peft_gets_a_manifest(folder: Path, dev: Path, backbone: Backbone) -> None:
    add_prefix(folder, backbone.spec, 3, position_offset=3)
    (folder / "manifest.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "task_type": "TOKEN_CLS"}))
    options = {"task": "tags", "problem_type": "token_classification", "labels": ["O", "B-city"]}
    renew(folder, dev, backbone, options)
    version = read_artifact(folder, backbone.spec).version(1)
    assert (version.task, version.labels) == ("tags", ("O", "B-city"))
    assert version.baseline is not None and len(version.baseline.labels) == 2


def test_texts_need_no_answers(folder: Path, tmp_path: Path, backbone: Backbone) -> None:
    texts = [f"a good text of paris {i}" for i in range(200)]
    samples.write_rows(tmp_path / "alone.tsv", ("text",), [(text,) for text in texts])
    assert renew(folder, tmp_path / "alone.tsv", backbone, {}) == 200
    alone = (folder / "manifest.json").read_bytes()
    records = [json.dumps({"tokens": text.split(), "note": None}) for text in texts]
    (tmp_path / "words.jsonl").write_text("\n".join([*records, '{"tokens": ["a", ""]}', '{"tokens": "a"}']))
    assert renew(folder, tmp_path / "words.jsonl", backbone, {}) == 200
    assert (folder / "manifest.json").read_bytes() == alone


def test_what_the_manifest_says_cannot_be_said_again(folder: Path, dev: Path, backbone: Backbone) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(SettingsError, match="has a manifest, which says what it is: leave out --task, --labels"):
        renew(folder, dev, backbone, {"task": "other", "labels": ["a", "b"]})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_text_many_times_is_one(folder: Path, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "texts.txt").write_text("a good text of paris\n" * 300)
    with pytest.raises(DataError, match=r"has 1 different texts, too few .* give 200 at least"):
        renew(folder, tmp_path / "texts.txt", backbone, {})


def test_few_texts_and_those_of_another_kind_are_refused(
    folder: Path, dev: Path, tmp_path: Path, backbone: Backbone
) -> None:
    before = (folder / "manifest.json").read_bytes()
    few = samples.write_rows(tmp_path / "few.tsv", ("text", "label"), samples.single_rows(random.Random(0), 199))
    with pytest.raises(DataError, match=r"few.tsv has 198 different texts, too few .* give 200 at least"):
        renew(folder, few, backbone, {})
    pairs = tmp_path / "pairs.tsv"
    samples.write_rows(pairs, ("text_a", "text_b", "label"), samples.pair_rows(random.Random(0), 250))
    with pytest.raises(DataError, match="holds inputs of kind pair, and the artifact reads text"):
        renew(folder, pairs, backbone, {})
    representation = write_artifact(tmp_path / "r", backbone.spec, "r", (), "embedding")
    (representation / "adapter_model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(SettingsError, match="is a representation"):
        renew(representation, dev, backbone, {})
    assert (folder / "manifest.json").read_bytes() == before


def test_a_disk_that_takes_nothing_leaves_the_old_manifest(
    folder: Path, dev: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "manifest.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        renew(folder, dev, backbone, {})
    assert (folder / "manifest.json").read_bytes() == before and len(list(folder.iterdir())) == 2
