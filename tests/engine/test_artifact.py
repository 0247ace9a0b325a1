"""An artifact is read whole or refused with every fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.domain import BackboneSpec, Readout, ReadoutKind, TextInput
from app.engine.artifact import flatten_prefix, read_artifact, unflatten_prefix
from app.engine.artifact_checks import find_faults, prefix_digest
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.golden import check_golden, predict
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError
from tests.engine.models import make_artifact, tiny_backbone

SPEC = tiny_backbone("bert").spec
HEAD = "base_model.classifier"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good artifact: one late-forked prefix, an attention readout, a hidden layer."""
    return _write(tmp_path / "mood", SPEC)


def _write(path: Path, spec: BackboneSpec, first_layer: int = 2) -> Path:
    path.mkdir()
    torch.manual_seed(0)
    width = (spec.num_layers - first_layer) * 2 * spec.num_heads * spec.head_size
    prefix = torch.randn(3, width, dtype=torch.float16)
    features = 2 * 3 * spec.hidden_size
    tensors = {
        "prompt_embeddings": prefix,
        "queries": torch.randn(2, 2, spec.hidden_size),
        f"{HEAD}.dense.weight": torch.randn(5, features) * 0.1,
        f"{HEAD}.dense.bias": torch.randn(5),
        f"{HEAD}.out_proj.weight": torch.randn(3, 5),
        f"{HEAD}.out_proj.bias": torch.randn(3),
    }
    manifest = {
        "format_version": 1,
        "task": "mood",
        "problem_type": "multi_label_classification",
        "labels": ["glad", "sad", "mad"],
        "thresholds": [0.3, 0.5, 0.4],
        "readout": {"kind": "attention", "layers": [1, 4], "num_queries": 2},
        "head": {"kind": "hidden", "activation": "gelu"},
        "prefixes": [
            {"digest": prefix_digest(prefix, first_layer), "first_layer": first_layer, "num_virtual_tokens": 3}
        ],
        "position_offset": 0,
        "backbone": {"fingerprint": spec.fingerprint},
    }
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _change(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def _faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(folder, SPEC)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def test_a_good_artifact_is_read_with_all_it_says(folder: Path) -> None:
    version = read_artifact(folder, SPEC).version(3)
    assert (version.task, version.version, version.labels) == ("mood", 3, ("glad", "sad", "mad"))
    assert version.thresholds == (0.3, 0.5, 0.4)
    assert (version.first_layer, version.readout.layers, version.readout.num_queries) == (2, (1, 4), 2)


def test_identity_is_the_content_and_not_the_name(folder: Path) -> None:
    digest = read_artifact(folder, SPEC).digest
    assert read_artifact(folder.rename(folder.parent / "other"), SPEC).digest == digest
    _change(folder.parent / "other", thresholds=[0.3, 0.5, 0.41])
    assert read_artifact(folder.parent / "other", SPEC).digest != digest


def test_all_faults_are_listed_at_once(folder: Path) -> None:
    _change(
        folder, format_version=9, task="No Such Name", labels=["a", "a"], problem_type="guess",
        readout={"kind": "attention", "layers": [4, 9]}, head={"kind": "linear", "activation": "swish"},
        backbone={"fingerprint": "sha256:other"}, position_offset=4,
    )  # fmt: skip
    text = " / ".join(_faults(folder))
    for part in (
        "format_version is 9",
        "task must be a name",
        "labels has a name twice",
        'problem_type is "guess"',
        "within the backbone's 4 layers",
        "num_queries of 1 or more",
        'head.activation is "swish"',
        "trained on the backbone with fingerprint sha256:other",
        "later forks share the trunk's positions",
        "3 thresholds for 2 labels",
    ):
        assert part in text


def test_matching_is_of_pairs(folder: Path) -> None:
    readout = {"kind": "matching", "layers": [1, 4], "num_queries": 2}
    _change(folder, readout=readout)
    assert _faults(folder) == ("the readout matching compares the texts of a pair, and the input is not pair",)
    _change(folder, readout=readout | {"num_queries": 0}, input="pair")
    assert _faults(folder) == ("the readout matching needs num_queries of 1 or more",)
    _change(folder, readout=readout, input="pair")
    (fault,) = _faults(folder)
    assert fault.endswith("not any × 768")  # 2 layers, 4 parts of a mean and 2 queries each, 32 numbers
    _tensors(folder, lambda tensors: tensors.update({f"{HEAD}.dense.weight": torch.zeros(5, 768)}))
    assert read_artifact(folder, SPEC).version(1).readout == Readout(ReadoutKind.MATCHING, (1, 4), 2)


def test_members_stand_side_by_side(folder: Path) -> None:
    readout = {"kind": "attention", "layers": [1, 4], "num_queries": 1, "num_members": 2}
    widened = {f"{HEAD}.dense.weight": torch.zeros(6, 128), f"{HEAD}.dense.bias": torch.zeros(6)}
    for count in (0, True, 17, 2.0):
        _change(folder, readout=readout | {"num_members": count})
        assert _faults(folder) == ("readout.num_members must be a number from 1 to 16",)
    _change(folder, readout=readout)
    _tensors(folder, lambda tensors: tensors.update({f"{HEAD}.dense.weight": torch.zeros(5, 128)}))
    (fault,) = _faults(folder)
    assert fault == "the head's dense has 5 rows, which 2 members cannot share equally"
    _tensors(folder, lambda tensors: tensors.update(widened | {f"{HEAD}.out_proj.weight": torch.zeros(3, 6)}))
    assert read_artifact(folder, SPEC).version(1).readout == Readout(ReadoutKind.ATTENTION, (1, 4), 1, 2)
    fault = "readout.num_members is 2: only readouts with queries and a hidden layer have several"
    for change in (
        {"readout": readout | {"kind": "mean"}},
        {"head": {"kind": "linear"}},
        {"problem_type": "embedding"},
    ):
        _change(folder, **{"readout": readout, "head": {"kind": "hidden", "activation": "gelu"}} | change)
        assert fault in _faults(folder)


def test_every_tensor_at_fault_is_named(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["queries"]
        tensors[f"{HEAD}.dense.weight"] = torch.zeros(5, 7)
        tensors[f"{HEAD}.dense.bias"][1] = float("nan")
        tensors[f"{HEAD}.out_proj.bias"] = torch.zeros(3, dtype=torch.int64)
        tensors["stranger"] = torch.zeros(1)

    _tensors(folder, spoil)
    text = " / ".join(_faults(folder))
    assert "tensor queries is missing" in text
    assert f"{HEAD}.dense.weight has shape 5 × 7, not any × 192" in text
    assert f"{HEAD}.dense.bias has values that are not finite" in text
    assert f"{HEAD}.out_proj.bias is of type torch.int64" in text
    assert "tensors that nothing reads: stranger" in text


@pytest.mark.parametrize("problem_type", ["token_classification", "single_label_classification"])
def test_transitions_are_of_taggers_and_of_all_their_tags(problem_type: str) -> None:
    spec, readout = tiny_backbone("bert").spec, "tokens" if problem_type.startswith("token") else "mean"
    good = make_artifact(spec, readout=readout, problem_type=problem_type)
    faults = find_faults(good.manifest, {**good.tensors, "transitions": torch.zeros(3, 3)}, spec)
    assert faults == (
        ["tensor transitions has shape 3 × 3, not 4 × 3"]
        if readout == "tokens"
        else ["tensors that nothing reads: transitions"]
    )


def test_labels_that_do_not_fit_the_head_are_a_fault(folder: Path) -> None:
    _change(folder, labels=["glad", "sad"], thresholds=[])
    assert any("out_proj.weight has shape 3 × 5, not 2 × any" in fault for fault in _faults(folder))


def test_a_head_whose_parts_do_not_fit_is_a_fault(folder: Path) -> None:
    _tensors(folder, lambda t: t.update({f"{HEAD}.out_proj.weight": torch.zeros(3, 6)}))
    assert any("parts do not fit" in fault for fault in _faults(folder))


def test_a_changed_prefix_is_noticed(folder: Path) -> None:
    _tensors(folder, lambda t: t["prompt_embeddings"].view(-1)[0].add_(1))
    assert any("has not the digest that the manifest states" in fault for fault in _faults(folder))


@pytest.mark.parametrize("name", ["adapter_model.bin", "head.pt", "more.pkl"])
def test_a_pickle_is_refused_unread(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04.")
    assert any(f"{name} is a pickle" in fault for fault in _faults(folder))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"\x80\x04" + b, lambda b: b""], ids=["cut", "pickle", "empty"]
)
def test_a_damaged_tensor_file_is_one_sentence(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert any("not a safetensors file, or is damaged" in fault for fault in _faults(folder))


def test_missing_and_unreadable_files_are_named(folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in _faults(tmp_path / "nowhere")[0]
    (folder / "manifest.json").write_text("[1, 2")
    assert "manifest.json is not JSON" in _faults(folder)[0]
    (folder / "manifest.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    assert len(_faults(folder)) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": None},
        {"labels": [1, 2, 3]},
        {"labels": "abc"},
        {"readout": []},
        {"readout": {"kind": "mean"}},
        {"readout": {"kind": ["mean"], "layers": [1]}},
        {"readout": {"kind": "attention", "layers": [1, 4], "num_queries": True}},
        {"prefixes": None},
        {"prefixes": [3]},
        {"prefixes": [{}]},
        {"prefixes": [{"digest": "x", "first_layer": -1}]},
        {"thresholds": ["high"]},
        {"thresholds": 3},
        {"head": None},
        {"position_offset": "2"},
        {"golden": {"text": "x"}},
        {"golden": [{"text": "x", "scores": ["a"]}]},
        {"backbone": 7},
        {"problem_type": 3},
        {"problem_type": "token_classification", "thresholds": []},
        {"readout": {"kind": "tokens", "layers": [4]}},
        {"evaluation": 3},
        {"problem_type": ["x"]},
        {"task": 5},
    ],
    ids=json.dumps,
)
def test_a_manifest_of_wrong_types_never_breaks_the_reader(folder: Path, fields: dict[str, Any]) -> None:
    _change(folder, **fields)
    assert _faults(folder)


def test_a_peft_folder_says_what_it_needs(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    text = " / ".join(_faults(folder))
    assert "is of type LORA, not PREFIX_TUNING" in text
    assert "give it (problem_type)" in text


def test_the_layout_of_prompt_embeddings_is_pefts() -> None:
    flat = torch.randn(5, 3 * 2 * 4 * 8)
    vectors = unflatten_prefix(flat, num_heads=4, head_size=8)
    peft = flat.view(5, 6, 4, 8).permute(1, 2, 0, 3)  # [2 · layers, heads, P, head size], keys and values in turn
    assert torch.equal(vectors[2, 0], peft[4])
    assert torch.equal(vectors[2, 1], peft[5])
    assert torch.equal(flatten_prefix(vectors), flat)


def test_a_resident_prefix_takes_at_most_twice_its_file(folder: Path) -> None:
    engine = Engine(tiny_backbone("bert"))
    artifact = read_artifact(folder, SPEC)
    engine.load(artifact)
    resident = engine.bank.get(artifact.digest).prefixes[0]
    size = sum(t.untyped_storage().nbytes() for t in (resident.keys, resident.values))
    in_file = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    assert size <= 2 * in_file.nbytes


def test_golden_examples_are_computed_again_and_compared(tmp_path: Path) -> None:
    backbone = Backbone.load("embedded", "cpu", "float32")
    path = _write(tmp_path / "mood", backbone.spec, first_layer=4)
    engine, tokenizer = Engine(backbone), TextTokenizer(backbone.path)
    engine.start()
    texts = ["a fine day", "what a mess this is"]
    plain = read_artifact(path, backbone.spec)
    engine.load(plain)
    assert check_golden(engine, tokenizer, plain) is None
    outputs = predict(engine, tokenizer, plain, [TextInput(text) for text in texts])
    golden = [{"text": text, "scores": list(out.scores)} for text, out in zip(texts, outputs, strict=True)]

    def difference(examples: list[dict[str, Any]]) -> float | None:
        _change(path, golden=examples)
        artifact = read_artifact(path, backbone.spec)
        engine.load(artifact)
        return check_golden(engine, tokenizer, artifact)

    try:
        assert difference(golden) == pytest.approx(0, abs=1e-6)
        golden[1]["scores"][2] += 0.25
        assert difference(golden) == pytest.approx(0.25, abs=1e-6)
        golden[1]["scores"].pop()
        with pytest.raises(ArtifactError, match="states 2 scores, and 3 came"):
            difference(golden)
    finally:
        engine.close()
