"""The versions that are resident: prefix vectors and heads on the device, shared where digests are equal.

Knows tensors and digests. Never writes into a tensor that is in use: a new version is new tensors under a new digest,
and the tensors of one that was unloaded live until the last one who holds them lets go.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.domain import Prefix, TaskVersion
from app.engine.artifact import Artifact
from app.engine.heads import ResidentHead
from app.engine.linear import LinearBank
from app.errors import NotFoundError


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ResidentPrefix:
    """One prefix's vectors on the device, from its first layer up."""

    prefix: Prefix
    keys: Tensor  # [num_layers - first_layer, heads, virtual tokens, head size]
    values: Tensor

    def at(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [heads, virtual tokens, head size] for layer `layer`; None below the first layer."""
        index = layer - self.prefix.first_layer
        return (self.keys[index], self.values[index]) if index >= 0 else None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ResidentVersion:
    """All that the engine needs to answer for one task version."""

    version: TaskVersion
    prefixes: tuple[ResidentPrefix, ...]
    head: ResidentHead


class PrefixBank:
    """Loaded from any thread; read by the engine's. A request holds what it was resolved to."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._versions: dict[str, ResidentVersion] = {}
        self._held: weakref.WeakValueDictionary[str, ResidentVersion] = weakref.WeakValueDictionary()
        self._prefixes: weakref.WeakValueDictionary[str, ResidentPrefix] = weakref.WeakValueDictionary()
        self._layers = LinearBank(device)
        self._lock = threading.Lock()
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._held)

    def load(self, artifact: Artifact) -> ResidentVersion:
        """Make the artifact resident until `unload`, or as long as what is returned is held by anybody.

        Loading what is resident already changes nothing.
        """
        version = artifact.version(0)
        with self._lock:
            known = self._held.get(version.digest)
            if known is not None:
                self._versions[version.digest] = known
                return known
            with self._beside_batches():
                prefixes = tuple(
                    self._resident_prefix(prefix, vectors)
                    for prefix, vectors in zip(version.prefixes, artifact.prefix_vectors, strict=True)
                )
                head = ResidentHead.from_tensors(version, artifact.manifest, artifact.tensors, self._layers)
            resident = ResidentVersion(version, prefixes, head)
            self._versions[version.digest] = self._held[version.digest] = resident
            return resident

    def unload(self, digest: str) -> None:
        with self._lock:
            self._versions.pop(digest, None)

    def get(self, digest: str) -> ResidentVersion:
        """Raises NotFoundError where that version is not resident."""
        resident = self._held.get(digest)
        if resident is None:
            raise NotFoundError(f"version {digest} is not loaded")
        return resident

    def _resident_prefix(self, prefix: Prefix, vectors: Tensor) -> ResidentPrefix:
        """`vectors`: [layers, 2, heads, virtual tokens, head size]."""
        known = self._prefixes.get(prefix.digest)
        if known is not None:
            return known
        keys, values = (vectors[:, i].to(self._device, self._dtype, copy=True).contiguous() for i in (0, 1))
        resident = ResidentPrefix(prefix, keys, values)
        self._prefixes[prefix.digest] = resident
        return resident

    @contextmanager
    def _beside_batches(self) -> Iterator[None]:
        """What is copied to a CUDA device within has arrived at the end, and no batch has waited for it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
