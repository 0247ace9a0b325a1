"""From a folder to a version that answers: read, checked, made resident, its golden examples computed again.

Knows the engine; nothing of the index, of stores or of requests.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from app.domain import TaskVersion, TextInput
from app.engine.artifact import FILES, MANIFEST, Artifact, embedding_artifact, manifest_bytes, read_artifact
from app.engine.backbone import apart
from app.engine.engine import Engine
from app.engine.golden import check_golden, predict
from app.engine.tokenizer import TextTokenizer
from app.errors import ArtifactError, BackboneError, ManifoldError
from app.telemetry.tracing import NOT_TRACING, Tracing

FULL_TOLERANCE = 1e-4  # what golden scores may differ by in float32
HALF_TOLERANCE = 1e-2  # and in the 16-bit types
_REMEMBERED = 10_000
_NOT_ON_CARDS = ("golden", "score_baseline")  # long, and only for those who have the artifact


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A checked artifact. It stays resident until it is unloaded, and as long as `handle` is held."""

    artifact: Artifact
    handle: object
    difference: float | None  # of its golden scores at worst; None where it has none

    @property
    def digest(self) -> str:
        return self.artifact.digest

    @property
    def card(self) -> str:
        """What the index keeps of the manifest, as JSON."""
        return card_of(self.artifact.manifest)


class Loader:
    """Safe from any thread but the engine's own."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        tolerance: float | None = None,
        traces: Tracing = NOT_TRACING,
    ) -> None:
        """`tolerance`: what golden scores may differ by; None: what suits the engine's dtype."""
        if tolerance is None:
            tolerance = FULL_TOLERANCE if engine.spec.dtype == "float32" else HALF_TOLERANCE
        self.engine = engine
        self.tokenizer = tokenizer
        self.tolerance = tolerance
        self._traces = traces
        self._passed: OrderedDict[str, float | None] = OrderedDict()  # digest → worst difference of its golden scores

    def load(self, folder: Path, options: Mapping[str, Any] | None = None) -> Loaded:
        """Raises ArtifactError with every fault; nothing stays resident then that was not so before.

        `options` complete a folder that comes straight from PEFT. Content whose golden examples came out right before
        is not asked again: nothing that they depend on has changed.
        """
        with self._traces.part("load") as told:
            with self._traces.part("verify"):
                artifact = apart(lambda: read_artifact(folder, self.engine.spec, options))
            told |= {"manifold.task": artifact.manifest["task"], "manifold.digest": artifact.digest}
            return self._load(artifact)

    def _load(self, artifact: Artifact) -> Loaded:
        with self._traces.part("place"):
            handle = self.engine.load(artifact)
        try:
            if artifact.digest not in self._passed:
                with self._traces.part("golden"):
                    self._remember(artifact, self._golden_difference(artifact))
        finally:
            self.engine.unload(artifact.digest)  # from here on only the handle keeps it
        return Loaded(artifact, handle, self._passed[artifact.digest])

    def representation(self) -> tuple[TaskVersion, object]:
        """The backbone's own, after a first forward. Raises BackboneError where it cannot do one."""
        artifact = embedding_artifact(self.engine.spec)
        handle = self.engine.load(artifact)
        (output,) = predict(self.engine, self.tokenizer, artifact, [TextInput("ready?")])
        if output.error is not None or not all(map(isfinite, output.scores)):
            raise BackboneError(f"the backbone cannot do a forward: {output.error or 'its states are not finite'}")
        return artifact.version(1), handle

    def worst_difference(self, folders: Sequence[Path]) -> float | None:
        """Over all golden examples of those folders that can be read at all; None where there is none."""
        differences = []
        for folder in folders:
            try:
                artifact = apart(partial(read_artifact, folder, self.engine.spec))
                handle = self.engine.load(artifact)
                differences.append(check_golden(self.engine, self.tokenizer, artifact))
                self.engine.unload(artifact.digest)
                del handle
            except ManifoldError:
                continue  # it is told where it is loaded to serve
        return max((d for d in differences if d is not None), default=None)

    def _remember(self, artifact: Artifact, difference: float | None) -> None:
        self._passed[artifact.digest] = difference
        while len(self._passed) > _REMEMBERED:
            self._passed.popitem(last=False)

    def _golden_difference(self, artifact: Artifact) -> float | None:
        difference = check_golden(self.engine, self.tokenizer, artifact)
        if difference is not None and not difference <= self.tolerance:  # not a number is no agreement either
            fault = f"golden scores differ by {difference:.2g}, and {self.tolerance:.0e} is allowed"
            raise ArtifactError(artifact.manifest["task"], [fault])
        return difference


def card_of(manifest: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in manifest.items() if key not in _NOT_ON_CARDS})


def artifact_files(artifact: Artifact, folder: Path) -> dict[str, bytes]:
    """What is stored of an artifact: its files, the manifest completed where the folder came straight from PEFT."""
    present = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return {MANIFEST: manifest_bytes(artifact.manifest)} | present
