"""Writes a draft of an artifact and measures it by the engine: what its manifest states is what was read back.

Knows artifacts and the engine; nothing of how they were learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from app.engine.artifact import Artifact, build_artifact, read_artifact
from app.engine.backbone import Backbone
from app.engine.engine import Engine
from app.engine.golden import check_golden
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError
from app.learning import evaluation, writer

_MAX_GOLDEN_DIFFERENCE = 1e-4

Measure = Callable[[Engine, TextTokenizer, Artifact], dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """An artifact that was not measured yet."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]


def write_measured(
    folder: Path, draft: Draft, exact: Backbone, measure: Measure, in_full: Collection[str] = ()
) -> dict[str, Any]:
    """Write the tensors, add what `measure` says of what is read back to the manifest, and write that last.

    Tensors named in `in_full` keep their precision. Returns the manifest.
    Raises ArtifactError where what was written does not give the golden scores that it states.
    """
    tokenizer = TextTokenizer(exact.path)
    writer.write_tensors(folder, draft.tensors, exact=in_full)
    read = build_artifact(draft.manifest, writer.read_tensors(folder), exact.spec, "draft", folder.name)
    with evaluation.running(exact) as engine:
        engine.load(read)
        manifest = draft.manifest | measure(engine, tokenizer, read)
        writer.write_peft_config(folder, manifest, exact.spec)
        writer.write_manifest(folder, manifest)
        written = read_artifact(folder, exact.spec)
        engine.load(written)
        difference = check_golden(engine, tokenizer, written) or 0.0
    if not difference <= _MAX_GOLDEN_DIFFERENCE:
        raise ArtifactError(manifest["task"], [f"read back, its golden scores differ by {difference:.1e}"])
    return manifest
