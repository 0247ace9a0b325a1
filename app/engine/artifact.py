"""The prefix artifact: a folder of manifest, PEFT configuration and safetensors, read and checked as a whole.

Knows file formats and shapes. Does not know whether a version is live, and runs no model.

Layout: `prompt_embeddings [num_virtual_tokens, layers · 2 · heads · head size]` as PEFT writes it (several prefixes:
`prompt_embeddings.0`, `.1`, …), `queries [layers read, num_queries, d]`, and the head under PEFT's names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, uint8

from app.domain import (
    BackboneSpec,
    HeadKind,
    InputKind,
    Prefix,
    ProblemType,
    Readout,
    ReadoutKind,
    TaskVersion,
)
from app.engine.heads import ACTIVATIONS, QUERIES, head_tensor_names
from app.errors import ArtifactError

FORMAT_VERSION = 1
CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
PROMPT = "prompt_embeddings"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A task version's content in memory, checked against one backbone."""

    digest: str  # "sha256:…" over the files
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # queries and head
    prefix_vectors: tuple[Tensor, ...]  # each [layers, 2, heads, virtual tokens, head size]

    def version(self, number: int) -> TaskVersion:
        """This content as version `number` of its task."""
        manifest = self.manifest
        readout = manifest["readout"]
        return TaskVersion(
            task=manifest["task"],
            version=number,
            digest=self.digest,
            problem_type=ProblemType(manifest["problem_type"]),
            labels=tuple(manifest["labels"]),
            readout=Readout(ReadoutKind(readout["kind"]), tuple(readout["layers"]), readout.get("num_queries", 0)),
            input_kind=InputKind(manifest.get("input", "text")),
            prefixes=tuple(
                Prefix(p["digest"], p["num_virtual_tokens"], p["first_layer"]) for p in manifest["prefixes"]
            ),
            position_offset=manifest.get("position_offset", 0),
            thresholds=tuple(manifest.get("thresholds") or ()),
        )


def read_artifact(path: Path, spec: BackboneSpec, options: Mapping[str, Any] | None = None) -> Artifact:
    """Read and check the folder at `path`. Every fault found is in the one ArtifactError.

    `options` (task, problem_type, labels, input) complete a folder that comes straight from PEFT, without a manifest.
    """
    name = path.name
    faults = _file_faults(path)
    if faults:
        raise ArtifactError(name, faults)
    files = {file: (path / file).read_bytes() for file in (CONFIG, TENSORS, MANIFEST) if (path / file).exists()}
    tensors = _parse_tensors(files[TENSORS], faults)
    config = _parse_json(files.get(CONFIG, b"{}"), CONFIG, faults)
    manifest = _parse_json(files.get(MANIFEST, b"{}"), MANIFEST, faults)
    if faults:
        raise ArtifactError(name, faults)
    if MANIFEST not in files:
        manifest = _manifest_from_peft(name, config, tensors, spec, options or {})
        files[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    return build_artifact(manifest, tensors, spec, _content_digest(files), name)


def build_artifact(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, digest: str, name: str
) -> Artifact:
    """An artifact from its parts, checked against `spec`. Raises ArtifactError with every fault."""
    faults = _manifest_faults(manifest, spec)
    if not faults:
        faults = _tensor_faults(manifest, tensors, spec)
    if faults:
        raise ArtifactError(name, faults)
    vectors = tuple(
        unflatten_prefix(tensors[key], spec.num_heads, spec.head_size) for key in _prompt_names(manifest)
    )
    head = {key: tensor for key, tensor in tensors.items() if not key.startswith(PROMPT)}
    return Artifact(digest, manifest, head, vectors)


def embedding_artifact(spec: BackboneSpec) -> Artifact:
    """The backbone's own representation: the mean of the last layer over the text's tokens, of length 1."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": "embedding",
        "problem_type": ProblemType.EMBEDDING,
        "labels": [],
        "readout": {"kind": ReadoutKind.MEAN, "layers": [spec.num_layers]},
        "prefixes": [],
        "backbone": {"fingerprint": spec.fingerprint},
    }
    digest = _content_digest({MANIFEST: json.dumps(manifest, sort_keys=True).encode()})
    return build_artifact(manifest, {}, spec, digest, spec.name)


def unflatten_prefix(flat: Tensor, num_heads: int, head_size: int) -> Tensor:
    """PEFT's [P, layers · 2 · heads · head size] (even entries keys, odd values) → [layers, 2, heads, P, head size]."""
    return flat.reshape(flat.shape[0], -1, 2, num_heads, head_size).permute(1, 2, 3, 0, 4)


def flatten_prefix(vectors: Tensor) -> Tensor:
    """The inverse of `unflatten_prefix`."""
    num_virtual_tokens = vectors.shape[3]
    return vectors.permute(3, 0, 1, 2, 4).reshape(num_virtual_tokens, -1).contiguous()


def prefix_digest(flat: Tensor, first_layer: int) -> str:
    """sha256 over a prefix's first layer, shape, dtype and bytes."""
    digest = hashlib.sha256(f"{first_layer}{tuple(flat.shape)}{flat.dtype}".encode())
    digest.update(flat.contiguous().view(dtype=uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def feature_size(readout: Readout, hidden_size: int) -> int:
    """The length of the vector (or of each token's vector) that a head reads."""
    pooled = 1 + readout.num_queries if readout.kind is ReadoutKind.ATTENTION else 1
    return len(readout.layers) * pooled * hidden_size


# -- files -------------------------------------------------------------------------------------------------------------


def _file_faults(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"{path} is not a folder"]
    faults = [
        f"{file.name} is a pickle, which can run code when it is read: save the tensors as {TENSORS}"
        for file in sorted(path.iterdir())
        if file.suffix in _PICKLES
    ]
    if not (path / TENSORS).is_file():
        faults.append(f"{TENSORS} is missing")
    elif (path / TENSORS).stat().st_size > _MAX_FILE_BYTES:
        faults.append(f"{TENSORS} is larger than {_MAX_FILE_BYTES // 2**20} MB")
    if not (path / MANIFEST).is_file() and not (path / CONFIG).is_file():
        faults.append(f"neither {MANIFEST} nor {CONFIG} is there")
    return faults


def _parse_tensors(content: bytes, faults: list[str]) -> dict[str, Tensor]:
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        faults.append(f"{TENSORS} is not a safetensors file, or is damaged: {error}")
        return {}


def _parse_json(content: bytes, name: str, faults: list[str]) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        faults.append(f"{name} is not JSON: {error}")
        return {}
    if not isinstance(parsed, dict):
        faults.append(f"{name} does not hold an object")
        return {}
    return parsed


def _content_digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


# -- a folder straight from PEFT ---------------------------------------------------------------------------------------


def _manifest_from_peft(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What PEFT's files say, completed by `options`; what neither says stays absent and becomes a fault."""
    faults = []
    if config.get("peft_type") != "PREFIX_TUNING":
        faults.append(f"{CONFIG} is of type {config.get('peft_type')}, not PREFIX_TUNING")
    if PROMPT not in tensors:
        faults.append(f"tensor {PROMPT} is missing")
    if "problem_type" not in options:
        faults.append("the problem type is not in the folder: give it (problem_type)")
    if faults:
        raise ArtifactError(name, faults)
    num_virtual_tokens = int(tensors[PROMPT].shape[0])
    out_weight = tensors.get(head_tensor_names(HeadKind.LINEAR)[0])
    is_hidden = out_weight is None
    if is_hidden:
        out_weight = tensors.get(head_tensor_names(HeadKind.HIDDEN)[2])
    num_labels = 0 if out_weight is None else int(out_weight.shape[0])
    head = {"kind": "hidden", "activation": "gelu" if spec.family == "electra" else "tanh"}
    return {
        "format_version": FORMAT_VERSION,
        "task": options.get("task", name),
        "problem_type": options["problem_type"],
        "labels": list(options.get("labels") or [f"LABEL_{i}" for i in range(num_labels)]),
        "input": options.get("input", "text"),
        "readout": {"kind": _peft_readout(config, is_hidden), "layers": [spec.num_layers]},
        "head": head if is_hidden else {"kind": "linear"},
        "prefixes": [
            {
                "digest": prefix_digest(tensors[PROMPT], 0),
                "num_virtual_tokens": num_virtual_tokens,
                "first_layer": 0,
            }
        ],
        "position_offset": num_virtual_tokens,
    }


def _peft_readout(config: Mapping[str, Any], is_hidden: bool) -> str:
    if config.get("task_type") == "TOKEN_CLS":
        return ReadoutKind.TOKENS
    return ReadoutKind.CLS if is_hidden else ReadoutKind.POOLER


# -- checks ------------------------------------------------------------------------------------------------------------


def _manifest_faults(manifest: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
    faults: list[str] = []
    if manifest.get("format_version") != FORMAT_VERSION:
        faults.append(f"format_version is {manifest.get('format_version')}, this server reads {FORMAT_VERSION}")
    if not _NAME.fullmatch(str(manifest.get("task", ""))):
        faults.append("task must be a name of a-z, 0-9, _, . and -, 64 characters at most")
    _check_choice(manifest.get("problem_type"), ProblemType, "problem_type", faults)
    _check_choice(manifest.get("input", "text"), InputKind, "input", faults)
    trained_on = _mapping(manifest, "backbone").get("fingerprint")
    if trained_on is not None and trained_on != spec.fingerprint:
        faults.append(
            f"it was trained on the backbone with fingerprint {trained_on}, and this one is {spec.fingerprint}"
        )
    faults += _label_faults(manifest)
    faults += _readout_faults(_mapping(manifest, "readout"), spec)
    faults += _prefix_faults(manifest, spec)
    if manifest.get("problem_type") != ProblemType.EMBEDDING:
        faults += _head_faults(_mapping(manifest, "head"))
    faults += _golden_faults(manifest.get("golden", []))
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
    least = {ProblemType.SINGLE_LABEL: 2, ProblemType.MULTI_LABEL: 1, ProblemType.TOKEN: 2}.get(problem_type, 0)
    if len(labels) < least:
        faults.append(f"{problem_type} needs at least {least} labels, and there are {len(labels)}")
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
    if readout.get("kind") == ReadoutKind.ATTENTION and not _is_count(readout.get("num_queries"), 1):
        faults.append("an attention readout needs num_queries of 1 or more")
    if readout.get("kind") == ReadoutKind.POOLER:
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


def _golden_faults(golden: Any) -> list[str]:
    is_list = isinstance(golden, list)
    if not is_list or not all(isinstance(g, dict) and isinstance(g.get("text"), str) for g in golden):
        return ["golden must be a list of objects with a text"]
    good = all(isinstance(g.get("scores"), list) and all(map(_is_number, g["scores"])) for g in golden)
    return [] if good else ["golden examples must have scores, a list of numbers"]


def _prompt_names(manifest: Mapping[str, Any]) -> list[str]:
    count = len(manifest["prefixes"])
    return [PROMPT] if count == 1 else [f"{PROMPT}.{i}" for i in range(count)]


def _expected_shapes(manifest: Mapping[str, Any], spec: BackboneSpec) -> dict[str, tuple[int | None, ...]]:
    """Name → shape of each tensor that must be there; None where the artifact chooses."""
    width = 2 * spec.num_heads * spec.head_size
    shapes: dict[str, tuple[int | None, ...]] = {
        name: (prefix["num_virtual_tokens"], (spec.num_layers - prefix["first_layer"]) * width)
        for name, prefix in zip(_prompt_names(manifest), manifest["prefixes"], strict=True)
    }
    layers, num_queries = manifest["readout"]["layers"], manifest["readout"].get("num_queries", 0)
    readout = Readout(ReadoutKind(manifest["readout"]["kind"]), tuple(layers), num_queries)
    if readout.kind is ReadoutKind.ATTENTION:
        shapes[QUERIES] = (len(layers), num_queries, spec.hidden_size)
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
    if weight.shape[0] == bias.shape[0] == out.shape[1]:
        return []
    return [f"the head's parts do not fit: dense {tuple(weight.shape)}, out_proj {tuple(out.shape)}"]


def _digest_faults(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} has not the digest that the manifest states: it was changed or damaged"
        for name, prefix in zip(_prompt_names(manifest), manifest["prefixes"], strict=True)
        if prefix_digest(tensors[name], prefix["first_layer"]) != prefix["digest"]
    ]
