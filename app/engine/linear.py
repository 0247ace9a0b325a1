"""Linear layers of heads: those of one shape lie side by side, so that neighbours are one matrix product.

Knows weights and where they lie; nothing of tasks or batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

_MOST_SLOTS = 16
_serials = count()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Linear:
    """One layer: a slot of a slab, written before anything reads it and not again while this object lives."""

    slab: _Slab
    slot: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.slab.shape

    @property
    def place(self) -> tuple[int, int]:
        """Layers sorted by it have their neighbours in memory beside them."""
        return self.slab.serial, self.slot

    def __call__(self, features: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return functional.linear(features, self.slab.weights[self.slot], self.slab.biases[self.slot])


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Slab:
    """Room for a few layers. It lives as long as one of its layers does."""

    weights: Tensor  # [slots, out, in]
    biases: Tensor  # [slots, out]
    tenants: list[weakref.ref[Linear] | None]  # of each slot
    serial: int = field(default_factory=lambda: next(_serials))

    @property
    def shape(self) -> tuple[int, int]:
        _, out_size, in_size = self.weights.shape
        return out_size, in_size

    def free_slots(self, count: int) -> int | None:
        """The first of `count` neighbours that nobody has."""
        run = 0
        for slot, tenant in enumerate(self.tenants):
            run = run + 1 if tenant is None or tenant() is None else 0
            if run == count:
                return slot + 1 - count
        return None


class LinearBank:
    """Places layers in float32 on one device. Not safe for threads: its owner holds a lock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slabs: dict[tuple[int, int], list[weakref.ref[_Slab]]] = {}

    def place(self, weight: Tensor, bias: Tensor) -> Linear:
        """`weight` [out, in], `bias` [out]."""
        (layer,) = self.place_all([weight], [bias])
        return layer

    def place_all(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Linear, ...]:
        """Layers of one shape, as neighbours."""
        slab, first = self._room(len(weights), *weights[0].shape)
        layers = tuple(Linear(slab, first + i) for i in range(len(weights)))
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            slab.weights[layer.slot].copy_(weight)
            slab.biases[layer.slot].copy_(bias)
            slab.tenants[layer.slot] = weakref.ref(layer)
        return layers

    def _room(self, count: int, out_size: int, in_size: int) -> tuple[_Slab, int]:
        """A slab, and the first of `count` slots in it."""
        slabs = [slab for ref in self._slabs.get((out_size, in_size), []) if (slab := ref()) is not None]
        self._slabs[out_size, in_size] = [weakref.ref(slab) for slab in slabs]
        for slab in slabs:
            first = slab.free_slots(count)
            if first is not None:
                return slab, first
        slots = min(_MOST_SLOTS, sum(len(slab.tenants) for slab in slabs) // 2)  # a third is idle at most
        slab = self._new_slab(max(count, slots), out_size, in_size)
        self._slabs[out_size, in_size].append(weakref.ref(slab))
        return slab, 0

    def _new_slab(self, slots: int, out_size: int, in_size: int) -> _Slab:
        weights = torch.empty(slots, out_size, in_size, device=self.device)
        return _Slab(weights, torch.empty(slots, out_size, device=self.device), [None] * slots)


def apply_all(layers: Sequence[Linear], features: Tensor) -> Tensor:
    """Layers of one shape, each on its own features: [layers, rows, in] → [layers, rows, out]."""
    parts = [_apply_run(layers[run], features[run]) for run in _runs(layers)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _apply_run(run: Sequence[Linear], features: Tensor) -> Tensor:
    if len(run) == 1:
        return run[0](features[0]).unsqueeze(0)
    slab, first = run[0].slab, run[0].slot
    slots = slice(first, first + len(run))
    return torch.baddbmm(slab.biases[slots].unsqueeze(1), features, slab.weights[slots].transpose(1, 2))


def _runs(layers: Sequence[Linear]) -> Iterator[slice]:
    """Neighbours in one slab."""
    start = 0
    for stop in range(1, len(layers) + 1):
        if stop == len(layers) or not _adjacent(layers[stop - 1], layers[stop]):
            yield slice(start, stop)
            start = stop


def _adjacent(one: Linear, other: Linear) -> bool:
    return one.slab is other.slab and one.slot + 1 == other.slot
