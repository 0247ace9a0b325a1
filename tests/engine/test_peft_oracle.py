"""PEFT is the oracle: its prefix checkpoints, read as they are, give its own scores."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from app.domain import Encoding, TaskVersion
from app.engine.artifact import build_artifact, read_artifact
from app.engine.artifact_checks import prefix_digest
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from tests.engine.models import CONFIGS, assert_close, random_encoding, run

PEFT_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LABELS = 3


@pytest.fixture(autouse=True)
def _peft_warns_of_its_own_dependencies() -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def _classifier(family: str, auto: type = AutoModelForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = LABELS
    network: nn.Module = auto.from_config(config, attn_implementation="eager")
    return network.eval()


def _checkpoint(network: nn.Module, path: Path, length: int, projection: bool, task_type: str = "SEQ_CLS") -> PeftModel:
    torch.manual_seed(length)
    config = PrefixTuningConfig(
        task_type=task_type, num_virtual_tokens=length, prefix_projection=projection, encoder_hidden_size=16
    )
    tuned = get_peft_model(copy.deepcopy(network), config).eval()
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.normal_(std=0.7)
    tuned.save_pretrained(str(path))
    return tuned


def _engine_over(network: nn.Module) -> Engine:
    encoder = copy.deepcopy(network.base_model)
    backbone = Backbone.from_model(encoder, "tiny")
    engine = Engine(backbone)
    engine.start()
    return engine


@torch.no_grad()
def _peft_logits(tuned: PeftModel, encoding: Encoding) -> Tensor:
    ids = torch.tensor([encoding.input_ids])
    types = torch.tensor([encoding.token_type_ids])
    logits: Tensor = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types).logits[0]
    return logits


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_checkpoints_written_by_peft_give_pefts_own_scores(family: str, projection: bool, tmp_path: Path) -> None:
    network = _classifier(family)
    engine = _engine_over(network)
    tuned: dict[str, PeftModel] = {}
    versions: list[TaskVersion] = []
    for length in (1, 7, 20):
        name = f"task{length}"
        tuned[name] = _checkpoint(network, tmp_path / name, length, projection)
        artifact = read_artifact(tmp_path / name, engine.spec, {"problem_type": "multi_label_classification"})
        engine.load(artifact)
        versions.append(artifact.version(1))
    pair = family == "bert"
    texts = [random_encoding(length, length, pair=pair) for length in (4, 31, 60)]
    outputs = run(engine, *[(text, versions) for text in texts])
    engine.close()
    for text, of_text in zip(texts, outputs, strict=True):
        for version, output in zip(versions, of_text, strict=True):
            assert_close(output.scores, _peft_logits(tuned[version.task], text).sigmoid().tolist())


def test_a_token_classifier_from_peft_gives_pefts_own_tags(tmp_path: Path) -> None:
    network = _classifier("bert", AutoModelForTokenClassification)
    engine = _engine_over(network)
    tuned = _checkpoint(network, tmp_path / "tags", 6, False, "TOKEN_CLS")
    options = {"problem_type": "token_classification", "labels": ["O", "B-x", "I-x"]}
    artifact = read_artifact(tmp_path / "tags", engine.spec, options)
    engine.load(artifact)
    text = random_encoding(17, 3)
    ((output,),) = run(engine, (text, [artifact.version(1)]))
    engine.close()
    expected = _peft_logits(tuned, text).softmax(-1)
    assert output.tags == tuple(expected.argmax(-1).tolist())
    assert_close(output.scores, expected.amax(-1).tolist())


@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_a_combination_equals_peft_with_one_longer_prefix(family: str, tmp_path: Path) -> None:
    network = _classifier(family)
    engine = _engine_over(network)
    parts = []
    for length in (3, 8):
        _checkpoint(network, tmp_path / str(length), length, projection=False)
        options = {"problem_type": "multi_label_classification", "task": "part"}
        parts.append(read_artifact(tmp_path / str(length), engine.spec, options))
    longer = _checkpoint(network, tmp_path / "longer", 11, projection=False)
    flat = [_flat_of(tmp_path / str(length)) for length in (3, 8)]
    with torch.no_grad():
        longer.prompt_encoder["default"].embedding.weight.copy_(torch.cat(flat))
    manifest = dict(parts[0].manifest) | {
        "prefixes": [{"digest": prefix_digest(f, 0), "num_virtual_tokens": f.shape[0], "first_layer": 0} for f in flat],
        "position_offset": 11,
    }
    tensors = dict(_head_of(tmp_path / "longer")) | {f"prompt_embeddings.{i}": f for i, f in enumerate(flat)}
    combined = build_artifact(manifest, tensors, engine.spec, "sha256:combined", "combined")
    engine.load(combined)
    text = random_encoding(25, 9)
    ((output,),) = run(engine, (text, [combined.version(1)]))
    engine.close()
    assert_close(output.scores, _peft_logits(longer, text).sigmoid().tolist())


def _flat_of(path: Path) -> Tensor:
    return load_file(path / "adapter_model.safetensors")["prompt_embeddings"]


def _head_of(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name != "prompt_embeddings"}
