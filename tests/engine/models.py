"""Tiny random encoders of every family, artifacts with random tensors, and a plain one-row reference for both."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.masking_utils import sdpa_mask

from app.domain import BackboneSpec, Encoding, EngineRequest, TaskOutput, TaskVersion
from app.engine.artifact import Artifact, build_artifact
from app.engine.artifact_checks import prefix_digest
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.plan import make_plan

VOCABULARY = 120
LAYERS = 4
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # random weights of the usual size hardly tell one text from another
}
_LEARNED = _SHAPE | {"max_position_embeddings": 96}

CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_LEARNED),
    "roberta": RobertaConfig(**_LEARNED),
    "xlm-roberta": XLMRobertaConfig(**_LEARNED),
    "camembert": CamembertConfig(**_LEARNED),
    "electra": ElectraConfig(**_LEARNED, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=LAYERS,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=96,
        initializer_range=0.3,
    ),
    "albert": AlbertConfig(**_LEARNED, embedding_size=16, num_hidden_groups=2),
    "modernbert": ModernBertConfig(
        **_SHAPE,
        max_position_embeddings=96,
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
FAMILY_NAMES = tuple(CONFIGS)


def tiny_network(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = AutoModel.from_config(copy.deepcopy(CONFIGS[family]), attn_implementation="eager")
    return network.eval()


def tiny_backbone(family: str) -> Backbone:
    return Backbone.from_model(tiny_network(family), f"tiny-{family}")


def make_artifact(
    spec: BackboneSpec,
    task: str = "task",
    *,
    prefixes: Sequence[tuple[int, int]] = (),
    position_offset: int = 0,
    readout: str = "mean",
    layers: Sequence[int] | None = None,
    num_queries: int = 0,
    num_members: int = 1,
    hidden: int = 0,
    activation: str = "tanh",
    problem_type: str = "single_label_classification",
    labels: int = 3,
    chained: bool = False,
    seed: int = 0,
) -> Artifact:
    """An artifact of random tensors. `prefixes` are (num_virtual_tokens, first_layer); `chained`: with transitions."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.5) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    layers = list(layers or [spec.num_layers])
    width = 2 * spec.num_heads * spec.head_size
    tensors: dict[str, Tensor] = {}
    listed = []
    for index, (length, first_layer) in enumerate(prefixes):
        name = "prompt_embeddings" if len(prefixes) == 1 else f"prompt_embeddings.{index}"
        tensors[name] = random(length, (spec.num_layers - first_layer) * width, scale=1.0)
        digest = prefix_digest(tensors[name], first_layer)
        listed.append({"digest": digest, "num_virtual_tokens": length, "first_layer": first_layer})
    if num_queries:
        tensors["queries"] = random(len(layers), num_members * num_queries, spec.hidden_size)
    features = len(layers) * (4 if readout == "matching" else 1) * (1 + num_queries) * spec.hidden_size
    outputs = 1 if problem_type == "regression" else labels
    if hidden:
        tensors["base_model.classifier.dense.weight"] = random(num_members * hidden, features, scale=0.1)
        tensors["base_model.classifier.dense.bias"] = random(num_members * hidden)
        tensors["base_model.classifier.out_proj.weight"] = random(outputs, num_members * hidden)
        tensors["base_model.classifier.out_proj.bias"] = random(outputs)
    elif problem_type != "embedding":
        tensors["base_model.classifier.weight"] = random(outputs, features, scale=0.1)
        tensors["base_model.classifier.bias"] = random(outputs)
    if chained:
        tensors["transitions"] = random(labels + 1, labels, scale=3.0)
    manifest = {
        "format_version": 1,
        "task": task,
        "problem_type": problem_type,
        "input": "pair" if readout == "matching" else "text",
        "labels": [] if problem_type in ("regression", "embedding") else [f"l{i}" for i in range(labels)],
        "readout": {"kind": readout, "layers": layers, "num_queries": num_queries, "num_members": num_members},
        "head": {"kind": "hidden" if hidden else "linear", "activation": activation},
        "prefixes": listed,
        "position_offset": position_offset,
        "backbone": {"fingerprint": spec.fingerprint},
    }
    content = hashlib.sha256(repr((task, seed, manifest)).encode()).hexdigest()
    return build_artifact(manifest, tensors, spec, f"sha256:{content}", task)


def random_encoding(length: int, seed: int, pair: bool = False) -> Encoding:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
    split = int(torch.randint(1, length, (), generator=generator)) if pair else length
    words = (None, *sorted(torch.randint(0, 6, (length - 2,), generator=generator).tolist()), None)
    types = (0,) * split + (1,) * (length - split)
    return Encoding(tuple(ids), types, word_ids=words, pair_start=split if pair else 0)


def best_of_all(scores: Tensor, transitions: Tensor) -> Tensor:
    """Of all sequences of tags: [words]; scores [words, labels], transitions [labels + 1, labels]."""
    words, labels = scores.shape
    found = torch.tensor(list(itertools.product(range(labels), repeat=words)))  # [sequences, words]
    totals = scores[torch.arange(words), found].sum(1) + transitions[-1][found[:, 0]]
    totals += transitions[found[:, :-1], found[:, 1:]].sum(1)
    return found[totals.argmax()]


def run(engine: Engine, *asked: tuple[Encoding, Sequence[TaskVersion]]) -> list[tuple[TaskOutput, ...]]:
    """All texts as one request, so that they can share a batch."""
    plans = tuple(make_plan(encoding, versions, engine.spec.num_layers) for encoding, versions in asked)
    return list(engine.submit(EngineRequest(plans)).result(timeout=60).outputs)


def assert_close(actual: Sequence[float], expected: Sequence[float], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(list(actual)), torch.tensor(list(expected)), atol=tolerance, rtol=0, check_dtype=False
    )


# -- the reference: one row, its prefix written straight into textbook attention ---------------------------------------


@dataclass
class _Reference:
    """Attention by the formula. Called once a layer, in order, so that it can count which layer it is in."""

    prefixes: list[tuple[int, Tensor]] = field(default_factory=list)  # (first layer, [layers, 2, heads, P, head size])
    layer: int = 0

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        begun = [vectors[self.layer - first] for first, vectors in self.prefixes if self.layer >= first]
        virtual = sum(v.shape[2] for v in begun)
        key = torch.cat([*(v[0][None] for v in begun), key], dim=2)
        value = torch.cat([*(v[1][None] for v in begun), value], dim=2)
        scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
        if mask is not None:
            scores[..., virtual:].masked_fill_(~mask, float("-inf"))
        self.layer += 1
        return (scores.softmax(-1) @ value).transpose(1, 2), None


_reference = _Reference()
AttentionInterface.register("reference", lambda *args, **kwargs: _reference(*args, **kwargs))
AttentionMaskInterface.register("reference", sdpa_mask)


@torch.no_grad()
def reference_scores(network: nn.Module, artifact: Artifact, encoding: Encoding) -> Tensor:
    """The scores of one version for one text, by the model's own forward: no batch, no padding, no sharing."""
    version, manifest, tensors = artifact.version(1), artifact.manifest, artifact.tensors
    _reference.layer = 0
    _reference.prefixes = [
        (prefix.first_layer, vectors) for prefix, vectors in zip(version.prefixes, artifact.prefix_vectors, strict=True)
    ]
    network.config._attn_implementation = "reference"
    ids = torch.tensor([encoding.input_ids])
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if network.config.model_type not in ("distilbert", "modernbert"):
        arguments["token_type_ids"] = torch.tensor([encoding.token_type_ids])
    if version.position_offset:
        first = {"roberta": 2, "xlm-roberta": 2, "camembert": 2}.get(network.config.model_type, 0)
        arguments["position_ids"] = torch.arange(ids.shape[1])[None] + version.position_offset + first
    out = network(**arguments, output_hidden_states=True)
    hidden = [*out.hidden_states[:-1], out.last_hidden_state]
    states = [hidden[n][0] for n in version.readout.layers]
    features = [
        _compared(queries, states, encoding.pair_start)
        if version.readout.kind == "matching"
        else _features(manifest, queries, states, out)
        for queries in _of_members(tensors, version.readout.num_members)
    ]
    return _head(manifest, tensors, features)


def _of_members(tensors: Any, count: int) -> list[Any]:
    """Each member's queries, [layers, num_queries, d]."""
    return list(tensors["queries"].chunk(count, dim=1)) if "queries" in tensors else [None]


def _features(manifest: Any, queries: Any, states: list[Tensor], out: Any) -> Tensor:
    match manifest["readout"]["kind"]:
        case "mean":
            return torch.cat([s.mean(0) for s in states])
        case "cls":
            return torch.cat([s[0] for s in states])
        case "pooler":
            return out.pooler_output[0]
        case "tokens":
            return torch.cat(states, dim=-1)
        case _:
            return torch.cat([_pooled(s, queries[layer]) for layer, s in enumerate(states)])


def _pooled(states: Tensor, queries: Tensor) -> Tensor:
    return torch.cat([states.mean(0), *((states @ query).softmax(0) @ states for query in queries)])


def _compared(queries: Any, states: list[Tensor], pair_start: int) -> Tensor:
    """One text alone is compared with itself."""
    pieces = []
    for layer, s in enumerate(states):
        u, v = (_pooled(side, queries[layer]) for side in (s[: pair_start or len(s)], s[pair_start:]))
        pieces += [u, v, (u - v).abs(), u * v]
    return torch.cat(pieces)


def _head(manifest: Any, tensors: Any, of_members: list[Tensor]) -> Tensor:
    features = of_members[0]
    if manifest["problem_type"] == "embedding":
        return features / features.norm()
    head = "base_model.classifier"
    if manifest["head"]["kind"] == "hidden":
        activation = {"tanh": torch.tanh, "gelu": nn.functional.gelu, "relu": torch.relu}[
            manifest["head"]["activation"]
        ]
        weights = tensors[f"{head}.dense.weight"].chunk(len(of_members))
        inner = torch.cat([f @ w.T for f, w in zip(of_members, weights, strict=True)], dim=-1)
        inner = inner + tensors[f"{head}.dense.bias"]
        logits = activation(inner) @ tensors[f"{head}.out_proj.weight"].T + tensors[f"{head}.out_proj.bias"]
    else:
        logits = features @ tensors[f"{head}.weight"].T + tensors[f"{head}.bias"]
    match manifest["problem_type"]:
        case "multi_label_classification":
            return logits.sigmoid()
        case "regression":
            return logits
        case _:
            return logits.softmax(-1)
