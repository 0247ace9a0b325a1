"""The prefix artifact: a folder of manifest, PEFT configuration and safetensors, read and checked as a whole.

Knows file formats and shapes. Does not know whether a version is live, and runs no model.

Layout: `prompt_embeddings [num_virtual_tokens, layers · 2 · heads · head size]` as PEFT writes it (several prefixes:
`prompt_embeddings.0`, `.1`, …), `queries [layers read, num_queries, d]`, the head under PEFT's names, and where a
tagger has learned how tags follow one another `transitions [labels + 1, labels]`. Of a readout with several members the
queries of each layer, the rows of `dense` and the columns of `out_proj` stand member by member; `out_proj` averages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from app.domain import (
    BackboneSpec,
    HeadKind,
    InputKind,
    Prefix,
    ProblemType,
    Readout,
    ReadoutKind,
    TaskVersion,
    content_digest,
)
from app.engine.artifact_checks import FORMAT_VERSION, PROMPT, find_faults, prefix_digest, prompt_names
from app.engine.baseline import read_baseline
from app.engine.heads import head_tensor_names
from app.errors import ArtifactError

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
FILES = (CONFIG, TENSORS, MANIFEST)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A task version's content in memory, checked against one backbone."""

    digest: str  # "sha256:…" over the files
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # queries, head and transitions
    prefix_vectors: tuple[Tensor, ...]  # each [layers, 2, heads, virtual tokens, head size]

    def version(self, number: int) -> TaskVersion:
        """This content as version `number` of its task."""
        return version_of(self.manifest, self.digest, number)


def version_of(manifest: Mapping[str, Any], digest: str, number: int) -> TaskVersion:
    """What a manifest that was checked says, as version `number`."""
    readout = manifest["readout"]
    version = TaskVersion(
        task=manifest["task"],
        version=number,
        digest=digest,
        problem_type=ProblemType(manifest["problem_type"]),
        labels=tuple(manifest["labels"]),
        readout=Readout(
            ReadoutKind(readout["kind"]),
            tuple(readout["layers"]),
            readout.get("num_queries", 0) if ReadoutKind(readout["kind"]).has_queries else 0,
            readout.get("num_members", 1),
        ),
        input_kind=InputKind(manifest.get("input", "text")),
        prefixes=tuple(Prefix(p["digest"], p["num_virtual_tokens"], p["first_layer"]) for p in manifest["prefixes"]),
        position_offset=manifest.get("position_offset", 0),
        thresholds=tuple(manifest.get("thresholds") or ()),
    )
    return replace(version, baseline=read_baseline(manifest, version))


def read_artifact(path: Path, spec: BackboneSpec, options: Mapping[str, Any] | None = None) -> Artifact:
    """Read and check the folder at `path`. Every fault found is in the one ArtifactError.

    `options` (task, problem_type, labels, input) complete a folder that comes straight from PEFT, without a manifest.
    """
    name = path.name
    faults = _file_faults(path)
    if faults:
        raise ArtifactError(name, faults)
    files = {file: (path / file).read_bytes() for file in FILES if (path / file).exists()}
    tensors = _parse_tensors(files[TENSORS], faults)
    config = _parse_json(files.get(CONFIG, b"{}"), CONFIG, faults)
    manifest = _parse_json(files.get(MANIFEST, b"{}"), MANIFEST, faults)
    if faults:
        raise ArtifactError(name, faults)
    if MANIFEST not in files:
        manifest = _manifest_from_peft(name, config, tensors, spec, options or {})
        files[MANIFEST] = manifest_bytes(manifest)
    return build_artifact(manifest, tensors, spec, content_digest(files), name)


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def build_artifact(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, digest: str, name: str
) -> Artifact:
    """An artifact from its parts, checked against `spec`. Raises ArtifactError with every fault."""
    faults = find_faults(manifest, tensors, spec)
    if faults:
        raise ArtifactError(name, faults)
    vectors = tuple(unflatten_prefix(tensors[key], spec.num_heads, spec.head_size) for key in prompt_names(manifest))
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
    digest = content_digest({MANIFEST: manifest_bytes(manifest)})
    return build_artifact(manifest, {}, spec, digest, spec.name)


def unflatten_prefix(flat: Tensor, num_heads: int, head_size: int) -> Tensor:
    """PEFT's [P, layers · 2 · heads · head size] (even entries keys, odd values) → [layers, 2, heads, P, head size]."""
    return flat.reshape(flat.shape[0], -1, 2, num_heads, head_size).permute(1, 2, 3, 0, 4)


def flatten_prefix(vectors: Tensor) -> Tensor:
    """The inverse of `unflatten_prefix`."""
    num_virtual_tokens = vectors.shape[3]
    return vectors.permute(3, 0, 1, 2, 4).reshape(num_virtual_tokens, -1).contiguous()


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
    except (ValueError, RecursionError) as error:
        faults.append(f"{name} is not JSON: {error}")
        return {}
    if not isinstance(parsed, dict):
        faults.append(f"{name} does not hold an object")
        return {}
    return parsed


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
