"""What the servers serve: Manifold's artifacts and the peers' checkpoints, all with random heads of four labels.

Knows how each is written; nothing of processes or load.
"""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.domain import BackboneSpec
from app.engine.artifact import MANIFEST, TENSORS, Artifact, flatten_prefix
from app.engine.artifact_checks import prompt_names
from tests.engine.models import make_artifact

TASKS = 8
LABELS = 4
VIRTUAL_TOKENS = 16
FIRST_LAYER = 4


@dataclass(frozen=True)
class Job:
    """What one text is asked for."""

    name: str
    kind: str  # its tasks are kind0, kind1, …
    tasks: int
    passes: float  # planned, for a backbone of six layers


READOUT = Job("1 attention readout", "readout", 1, 1.0)
READOUTS = Job("8 attention readouts", "readout", 8, 1.0)
PREFIX = Job("1 own prefix, first layer 4", "prefix", 1, 1.0)
PREFIXES = Job("8 own prefixes, first layer 4", "prefix", 8, (4 + 8 * 2) / 6)
HEADS = Job("8 heads on one combination of 8 prefixes", "combined", 8, 1.0)
JOBS = (READOUT, READOUTS, PREFIX, PREFIXES, HEADS)

_KINDS: dict[str, dict[str, object]] = {
    # The size that `manifold learn` chooses for few labels.
    "readout": {"readout": "attention", "layers": [2, 4, 6], "num_queries": 2, "hidden": 32},
    "prefix": {"prefixes": [(VIRTUAL_TOKENS, FIRST_LAYER)]},
    "combined": {"prefixes": [(VIRTUAL_TOKENS, 3)] * 8},
}


def write_prefixes(folder: Path, spec: BackboneSpec) -> None:
    """An artifact for every task of every kind; those that read one combination differ in their heads alone."""
    for kind, options in _KINDS.items():
        first: Artifact | None = None
        for index in range(TASKS):
            artifact = make_artifact(spec, f"{kind}{index}", seed=index, labels=LABELS, **options)  # type: ignore[arg-type]
            first = first or artifact
            _write(folder / f"{kind}{index}", artifact, first if kind == "combined" else artifact)


def write_readouts(folder: Path, spec: BackboneSpec, tasks: int) -> list[str]:
    """So many tasks that read the bare trunk. Their names."""
    names = [f"task{index:03}" for index in range(tasks)]
    for index, name in enumerate(names):
        artifact = make_artifact(spec, name, seed=index, labels=LABELS, **_KINDS["readout"])  # type: ignore[arg-type]
        _write(folder / name, artifact, artifact)
    return names


def _write(folder: Path, artifact: Artifact, prefixed: Artifact) -> None:
    folder.mkdir(parents=True)
    prompts = {
        name: flatten_prefix(vectors)
        for name, vectors in zip(prompt_names(prefixed.manifest), prefixed.prefix_vectors, strict=True)
    }
    save_file({**artifact.tensors, **prompts}, folder / TENSORS)
    manifest = {**artifact.manifest, "prefixes": prefixed.manifest["prefixes"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def export_onnx(model: str, program: Path, folder: Path) -> None:
    """The backbone for ONNX Runtime, by the exporter of a peer's environment; nothing where that is missing."""
    if program.exists():
        command = [str(program), "export", "onnx", "-m", model, "--task", "feature-extraction"]
        subprocess.run([*command, "--library", "transformers", str(folder)], capture_output=True, check=False)
    folder.mkdir(exist_ok=True)  # a server that finds nothing there says so


def write_classifiers(folder: Path, model: str) -> list[Path]:
    """The backbone with a head of its own for each task, as transformers reads them: what a user would fine-tune."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # that the heads are new
    paths = []
    for index in range(TASKS):
        torch.manual_seed(index)
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=LABELS)
        path = folder / f"classifier{index}"
        network.save_pretrained(path)
        AutoTokenizer.from_pretrained(model).save_pretrained(path)
        paths.append(path)
    return paths
