"""Small artifact folders, written as a trainer would write them, with weights drawn at random."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from app.domain import BackboneSpec


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
