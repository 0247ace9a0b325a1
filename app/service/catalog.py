"""What is live: the snapshot, built from a folder of artifacts at start, and what the artifacts say of themselves.

An artifact becomes visible once it was read, loaded and its golden examples came out right; a broken one is left out
and the others serve. Knows the engine and the folder; nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from app.domain import Encoding, ProblemType, Snapshot, Task, TaskVersion, TextInput
from app.engine.artifact import Artifact, embedding_artifact, read_artifact
from app.engine.engine import Engine
from app.engine.folder import ArtifactFolder, list_artifacts
from app.engine.golden import check_golden, predict
from app.engine.plan import make_plan
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError, BackboneError, ManifoldError

logger = logging.getLogger(__name__)

FIRST_GENERATION = 1
FULL_TOLERANCE = 1e-4  # what golden scores may differ by in float32
HALF_TOLERANCE = 1e-2  # and in the 16-bit types
_SHORTEST = Encoding(input_ids=(0, 0, 0), token_type_ids=(0, 0, 0))


@dataclass(slots=True)
class Catalog:
    """`snapshot` is replaced whole, in one assignment; a request keeps the one that it began with."""

    snapshot: Snapshot
    num_layers: int
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by digest
    left_out: Mapping[str, str] = field(default_factory=dict)  # artifact → why it is not served
    worst_difference: float | None = None  # of any golden example; None where there was none to measure

    def passes_alone(self, version: TaskVersion) -> float:
        """What `version` costs when nothing else is asked."""
        return round(make_plan(_SHORTEST, [version], self.num_layers).passes, 4)


def build_catalog(root: Path, engine: Engine, tokenizer: TextTokenizer, tolerance: float | None = None) -> Catalog:
    """Generation 1. The representation must answer first: that forward is what ready rests on.

    `tolerance`: what golden scores may differ by; None: what suits the engine's dtype.
    Raises SettingsError where `root` is no folder, BackboneError where the backbone cannot do a forward.
    """
    if tolerance is None:
        tolerance = FULL_TOLERANCE if engine.spec.dtype == "float32" else HALF_TOLERANCE
    shelf = _Shelf(engine, tokenizer, tolerance)
    shelf.add_representation()
    for folder in list_artifacts(root):
        shelf.add(root, folder)
    return shelf.catalog()


class _Shelf:
    """Collects what loads while the catalogue is built."""

    def __init__(self, engine: Engine, tokenizer: TextTokenizer, tolerance: float) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._tolerance = tolerance
        self._tasks: dict[str, dict[int, TaskVersion]] = {}
        self._representations: dict[str, TaskVersion] = {}
        self._evaluations: dict[str, Mapping[str, Any]] = {}
        self._left_out: dict[str, str] = {}
        self._differences: list[float] = []

    def add_representation(self) -> None:
        artifact = embedding_artifact(self._engine.spec)
        self._engine.load(artifact)
        (output,) = predict(self._engine, self._tokenizer, artifact, [TextInput("ready?")])
        if output.error is not None or not all(map(isfinite, output.scores)):
            raise BackboneError(f"the backbone cannot do a forward: {output.error or 'its states are not finite'}")
        self._representations[self._engine.spec.name] = artifact.version(1)

    def add(self, root: Path, folder: ArtifactFolder) -> None:
        name = str(folder.path.relative_to(root))
        try:
            self._add(folder)
        except ManifoldError as error:
            self._left_out[name] = str(error)
            logger.error("artifact %s is left out: %s", folder.path, error)
        except Exception as error:  # one artifact must not keep the others from serving
            self._left_out[name] = f"reading it failed: {error}"
            logger.exception("artifact %s is left out", folder.path)

    def catalog(self) -> Catalog:
        tasks = {name: Task(name, max(versions), versions) for name, versions in sorted(self._tasks.items())}
        return Catalog(
            Snapshot(FIRST_GENERATION, tasks, self._representations),
            self._engine.spec.num_layers,
            self._evaluations,
            self._left_out,
            max(self._differences, default=None),
        )

    def _add(self, folder: ArtifactFolder) -> None:
        artifact = read_artifact(folder.path, self._engine.spec)
        version = artifact.version(folder.version)
        self._check_free(version)
        self._engine.load(artifact)
        try:
            self._check_golden(artifact)
        except Exception:
            self._engine.unload(artifact.digest)
            raise
        self._evaluations[artifact.digest] = artifact.manifest.get("evaluation") or {}
        if version.problem_type is ProblemType.EMBEDDING:
            self._representations[version.task] = version
        else:
            self._tasks.setdefault(version.task, {})[version.version] = version

    def _check_free(self, version: TaskVersion) -> None:
        if version.version in self._tasks.get(version.task, {}) or version.task in self._representations:
            raise ArtifactError(version.task, [f"another folder has version {version.version} of the same name"])

    def _check_golden(self, artifact: Artifact) -> None:
        difference = check_golden(self._engine, self._tokenizer, artifact)
        if difference is None:
            return
        self._differences.append(difference)
        if not difference <= self._tolerance:  # not a number is no agreement either
            fault = f"golden scores differ by {difference:.2g}, and {self._tolerance:.0e} is allowed"
            raise ArtifactError(artifact.manifest["task"], [fault])
