"""The checks of an artifact: every fault that manifest and tensors have against one backbone, a sentence each.

Knows shapes and names. Reads no files and raises nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, uint8

from app.domain import BackboneSpec, HeadKind, InputKind, ProblemType, Readout, ReadoutKind
from app.engine.baseline import baseline_faults
from app.engine.chain import TRANSITIONS
from app.engine.heads import ACTIVATIONS, QUERIES, head_tensor_names

FORMAT_VERSION = 1
MOST_GOLDEN = 100
MOST_MEMBERS = 16  # of a readout
PROMPT = "prompt_embeddings"
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def find_faults(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec) -> list[str]:
    """Every fault found. Tensors are looked at only once the manifest says what they must be."""
    return _manifest_faults(manifest, spec) or _tensor_faults(manifest, tensors, spec)


def prompt_names(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the prefixes' tensors, in order."""
    count = len(manifest["prefixes"])
    return [PROMPT] if count == 1 else [f"{PROMPT}.{i}" for i in range(count)]


def prefix_digest(flat: Tensor, first_layer: int) -> str:
    """sha256 over a prefix's first layer, shape, dtype and bytes."""
    digest = hashlib.sha256(f"{first_layer}{tuple(flat.shape)}{flat.dtype}".encode())
    digest.update(flat.contiguous().view(dtype=uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def feature_size(readout: Readout, hidden_size: int) -> int:
    """The length of the vector (or of each token's vector) that a head, or each of its members, reads."""
    pooled = 1 + readout.num_queries if readout.kind.has_queries else 1
    sides = 4 if readout.kind is ReadoutKind.MATCHING else 1  # both texts of a pair, their difference, their product
    return len(readout.layers) * sides * pooled * hidden_size


def _manifest_faults(manifest: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
    faults: list[str] = []
    if manifest.get("format_version") != FORMAT_VERSION:
        faults.append(f"format_version is {manifest.get('format_version')}, this server reads {FORMAT_VERSION}")
    task = manifest.get("task")
    if not isinstance(task, str) or not NAME.fullmatch(task):
        faults.append("task must be a name of a-z, 0-9, _, . and -, 64 characters at most")
    _check_choice(manifest.get("problem_type"), ProblemType, "problem_type", faults)
    _check_choice(manifest.get("input", "text"), InputKind, "input", faults)
    trained_on = _mapping(manifest, "backbone").get("fingerprint", spec.fingerprint)
    if not isinstance(manifest.get("backbone", {}), dict):
        faults.append("backbone must be an object")
    elif trained_on != spec.fingerprint:
        faults.append(
            f"it was trained on the backbone with fingerprint {trained_on}, and this one is {spec.fingerprint}"
        )
    faults += _label_faults(manifest)
    faults += _readout_faults(_mapping(manifest, "readout"), spec)
    faults += _prefix_faults(manifest, spec)
    if manifest.get("problem_type") != ProblemType.EMBEDDING:
        faults += _head_faults(_mapping(manifest, "head"))
    faults += _golden_faults(manifest.get("golden", []))
    faults += _token_faults(manifest)
    faults += _member_faults(manifest)
    if _mapping(manifest, "readout").get("kind") == ReadoutKind.MATCHING and manifest.get("input") != InputKind.PAIR:
        faults.append("the readout matching compares the texts of a pair, and the input is not pair")
    faults += baseline_faults(manifest)
    if not isinstance(manifest.get("evaluation", {}), dict):
        faults.append("evaluation must be an object")
    return faults


def _mapping(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _check_choice(value: Any, choices: Any, name: str, faults: list[str]) -> None:
    allowed = [choice.value for choice in choices]
    if value not in allowed:
        faults.append(f'{name} is "{value}": it must be one of {", ".join(allowed)}')


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _label_faults(manifest: Mapping[str, Any]) -> list[str]:
    labels = manifest.get("labels")
    problem_type = manifest.get("problem_type")
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        return ["labels must be a list of names"]
    faults = []
    if len(set(labels)) != len(labels):
        faults.append("labels has a name twice")
    least = {"single_label_classification": 2, "multi_label_classification": 1, "token_classification": 2}
    if len(labels) < least.get(str(problem_type), 0):
        faults.append(f"{problem_type} has too few labels: {len(labels)}")
    thresholds = manifest.get("thresholds") or []
    if not isinstance(thresholds, list) or not all(_is_number(t) for t in thresholds):
        faults.append("thresholds must be a list of numbers")
    elif thresholds and len(thresholds) != len(labels):
        faults.append(f"there are {len(thresholds)} thresholds for {len(labels)} labels")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _readout_faults(readout: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
    faults: list[str] = []
    _check_choice(readout.get("kind"), ReadoutKind, "readout.kind", faults)
    layers = readout.get("layers")
    if not isinstance(layers, list) or not layers or not all(_is_count(n, 1) for n in layers):
        faults.append("readout.layers must be a list of layer numbers from 1")
    elif sorted(set(layers)) != layers or layers[-1] > spec.num_layers:
        faults.append(f"readout.layers must rise and stay within the backbone's {spec.num_layers} layers: {layers}")
    kind = readout.get("kind")
    if kind in [known for known in ReadoutKind if known.has_queries] and not _is_count(readout.get("num_queries"), 1):
        faults.append(f"the readout {kind} needs num_queries of 1 or more")
    if kind == ReadoutKind.POOLER:
        if not spec.has_pooler:
            faults.append("the readout is the backbone's pooler, and this backbone has none")
        if layers != [spec.num_layers]:
            faults.append("a pooler reads the last layer alone")
    return faults


def _prefix_faults(manifest: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
    prefixes = manifest.get("prefixes")
    offset = manifest.get("position_offset", 0)
    if not isinstance(prefixes, list) or not all(isinstance(p, dict) for p in prefixes):
        return ["prefixes must be a list of objects"]
    faults = []
    for index, prefix in enumerate(prefixes):
        if not isinstance(prefix.get("digest"), str):
            faults.append(f"prefix {index} has no digest")
        if not _is_count(prefix.get("num_virtual_tokens"), 1):
            faults.append(f"prefix {index}: num_virtual_tokens must be 1 or more")
        if not _is_count(prefix.get("first_layer")) or prefix["first_layer"] >= spec.num_layers:
            faults.append(f"prefix {index}: first_layer must be in 0 … {spec.num_layers - 1}")
    if not _is_count(offset) or offset >= spec.max_tokens:
        faults.append(f"position_offset must be in 0 … {spec.max_tokens - 1}")
    elif offset and not any(p.get("first_layer") == 0 for p in prefixes):
        faults.append("a position_offset needs a prefix from layer 0 on: later forks share the trunk's positions")
    return faults


def _head_faults(head: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    _check_choice(head.get("kind"), HeadKind, "head.kind", faults)
    if head.get("activation", "tanh") not in ACTIVATIONS:
        faults.append(f'head.activation is "{head.get("activation")}": it must be one of {", ".join(ACTIVATIONS)}')
    return faults


def _token_faults(manifest: Mapping[str, Any]) -> list[str]:
    """Token classification and the tokens readout go together, over single texts."""
    is_token = manifest.get("problem_type") == ProblemType.TOKEN
    if is_token != (_mapping(manifest, "readout").get("kind") == ReadoutKind.TOKENS):
        return ["token_classification needs the readout tokens, and no other problem type can have it"]
    return (
        ["token_classification reads single texts, not pairs"] if is_token and manifest.get("input") == "pair" else []
    )


def _member_faults(manifest: Mapping[str, Any]) -> list[str]:
    """Only what has hidden layers gains by an average: that of linear heads is one linear head."""
    readout = _mapping(manifest, "readout")
    num_members = readout.get("num_members", 1)
    if not _is_count(num_members, 1) or num_members > MOST_MEMBERS:
        return [f"readout.num_members must be a number from 1 to {MOST_MEMBERS}"]
    can_have = readout.get("kind") in [kind for kind in ReadoutKind if kind.has_queries]
    can_have &= _mapping(manifest, "head").get("kind") == HeadKind.HIDDEN
    can_have &= manifest.get("problem_type") != ProblemType.EMBEDDING
    if num_members > 1 and not can_have:
        return [f"readout.num_members is {num_members}: only readouts with queries and a hidden layer have several"]
    return []


def _golden_faults(golden: Any) -> list[str]:
    is_list = isinstance(golden, list)
    if not is_list or not all(isinstance(g, dict) and isinstance(g.get("text"), str) for g in golden):
        return ["golden must be a list of objects with a text"]
    if len(golden) > MOST_GOLDEN:
        return [f"there are {len(golden)} golden examples, and each server computes them: {MOST_GOLDEN} at most"]
    good = all(isinstance(g.get("scores"), list) and all(map(_is_number, g["scores"])) for g in golden)
    return [] if good else ["golden examples must have scores, a list of numbers"]


def _expected_shapes(manifest: Mapping[str, Any], spec: BackboneSpec) -> dict[str, tuple[int | None, ...]]:
    """Name → shape of each tensor that must be there; None where the artifact chooses."""
    width = 2 * spec.num_heads * spec.head_size
    shapes: dict[str, tuple[int | None, ...]] = {
        name: (prefix["num_virtual_tokens"], (spec.num_layers - prefix["first_layer"]) * width)
        for name, prefix in zip(prompt_names(manifest), manifest["prefixes"], strict=True)
    }
    layers, num_queries = manifest["readout"]["layers"], manifest["readout"].get("num_queries", 0)
    num_members = manifest["readout"].get("num_members", 1)
    readout = Readout(ReadoutKind(manifest["readout"]["kind"]), tuple(layers), num_queries, num_members)
    if readout.kind.has_queries:
        shapes[QUERIES] = (len(layers), num_members * num_queries, spec.hidden_size)
    if manifest["problem_type"] == ProblemType.EMBEDDING:
        return shapes
    outputs = 1 if manifest["problem_type"] == ProblemType.REGRESSION else len(manifest["labels"])
    features = feature_size(readout, spec.hidden_size)
    kind = HeadKind(manifest["head"]["kind"])
    names = head_tensor_names(kind)
    if kind is HeadKind.LINEAR:
        return shapes | dict(zip(names, ((outputs, features), (outputs,)), strict=True))
    return shapes | dict(zip(names, ((None, features), (None,), (outputs, None), (outputs,)), strict=True))


def _tensor_faults(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec) -> list[str]:
    faults: list[str] = []
    expected = _expected_shapes(manifest, spec)
    if TRANSITIONS in tensors and manifest["problem_type"] == ProblemType.TOKEN:
        expected[TRANSITIONS] = (len(manifest["labels"]) + 1, len(manifest["labels"]))
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"tensor {name} is missing")
        elif not _fits(tensors[name], shape):
            wanted = " × ".join("any" if n is None else str(n) for n in shape)
            faults.append(f"tensor {name} has shape {' × '.join(map(str, tensors[name].shape))}, not {wanted}")
        elif not tensors[name].is_floating_point():
            faults.append(f"tensor {name} is of type {tensors[name].dtype}, not floating point")
        elif not bool(tensors[name].isfinite().all()):
            faults.append(f"tensor {name} has values that are not finite")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        faults.append(f"tensors that nothing reads: {', '.join(unknown)}")
    if not faults:
        faults += _hidden_size_faults(manifest, tensors)
        faults += _digest_faults(manifest, tensors)
    return faults


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.dim() == len(shape) and all(w in (None, n) for n, w in zip(tensor.shape, shape, strict=True))


def _hidden_size_faults(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    if manifest["problem_type"] == ProblemType.EMBEDDING or manifest["head"]["kind"] != HeadKind.HIDDEN:
        return []
    weight, bias, out, _ = (tensors[name] for name in head_tensor_names(HeadKind.HIDDEN))
    num_members = manifest["readout"].get("num_members", 1)
    if weight.shape[0] % num_members or not weight.shape[0]:
        return [f"the head's dense has {weight.shape[0]} rows, which {num_members} members cannot share equally"]
    if weight.shape[0] == bias.shape[0] == out.shape[1]:
        return []
    return [f"the head's parts do not fit: dense {tuple(weight.shape)}, out_proj {tuple(out.shape)}"]


def _digest_faults(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} has not the digest that the manifest states: it was changed or damaged"
        for name, prefix in zip(prompt_names(manifest), manifest["prefixes"], strict=True)
        if prefix_digest(tensors[name], prefix["first_layer"]) != prefix["digest"]
    ]
