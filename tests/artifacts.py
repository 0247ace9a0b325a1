"""Small artifact folders, written as a trainer would write them, with weights drawn at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from app.domain import BackboneSpec
from app.engine.artifact_checks import prefix_digest


def write_artifact(
    folder: Path,
    spec: BackboneSpec,
    task: str,
    labels: Sequence[str] = ("no", "yes"),
    problem_type: str = "single_label_classification",
    seed: int = 0,
    **manifest: Any,
) -> Path:
    """A linear head on the mean of the last layer (of its tokens, for token classification). Returns the folder."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    shape = (max(len(labels), 1), spec.hidden_size)
    tensors = {
        "base_model.classifier.weight": random.normal(size=shape).astype(np.float32),
        "base_model.classifier.bias": np.zeros(shape[0], np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    kind = "tokens" if problem_type == "token_classification" else "mean"
    stated = {
        "format_version": 1,
        "task": task,
        "problem_type": problem_type,
        "labels": list(labels),
        "readout": {"kind": kind, "layers": [spec.num_layers]},
        "head": {"kind": "linear"},
        "prefixes": [],
        "backbone": {"fingerprint": spec.fingerprint},
    }
    (folder / "manifest.json").write_text(json.dumps(stated | manifest))
    return folder


def add_prefix(
    folder: Path,
    spec: BackboneSpec,
    num_virtual_tokens: int,
    first_layer: int = 0,
    position_offset: int = 0,
    seed: int = 0,
) -> Path:
    """Puts a prefix before what such a folder reads. Returns the folder."""
    path = folder / "adapter_model.safetensors"
    width = 2 * spec.num_heads * spec.head_size * (spec.num_layers - first_layer)
    flat = np.random.default_rng(seed).normal(size=(num_virtual_tokens, width)).astype(np.float32)
    save_file({**load_file(path), "prompt_embeddings": flat}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = prefix_digest(torch.from_numpy(flat), first_layer)
    prefix = {"digest": digest, "num_virtual_tokens": num_virtual_tokens, "first_layer": first_layer}
    added = {"prefixes": [prefix], "position_offset": position_offset}
    (folder / "manifest.json").write_text(json.dumps(manifest | added))
    return folder
