"""What is frozen, computed once: the states of every text after the layers that are read, and where a prefix begins.

Different texts lie end to end in flat tensors `[tokens, d]` in half precision; batches are gathered from them.
Tensors lie where the backbone is, if that has much room; those too large for memory in unnamed files, which end with
the process.
Knows encodings and the backbone; nothing of labels or heads.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import Encoding
from app.engine.backbone import Backbone
from app.errors import DataError
from app.learning.rows import LayerPrefix, positions, run_layers

MAX_BYTES = 4 * 10**9
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}  # whose states are made at once
_STORED = torch.float16
_SHARE_OF_FREE = 0.25  # of a GPU's memory that states of some texts may take: others, batches and graphs need some too


class Memory:
    """What of all states of this process lies in memory; more goes to files. Not for several threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._held: dict[int, int] = {}  # bytes of each tensor, by its id

    def has_room(self, size_bytes: int) -> bool:
        return sum(self._held.values()) + size_bytes <= self.max_bytes

    def hold(self, tensor: Tensor) -> Tensor:
        """Until nobody has it any more."""
        self._held[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, self._held.pop, id(tensor), None)
        return tensor


MEMORY = Memory()


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What to keep: `read_layers` as readouts see them, and the raw states after `fork_layer` layers."""

    read_layers: tuple[int, ...]
    fork_layer: int | None = None
    prefixes: tuple[LayerPrefix, ...] = ()  # frozen ones
    position_offset: int = 0

    @property
    def cached_reads(self) -> tuple[int, ...]:
        """Layers above the fork change with the prefix that is trained."""
        if self.fork_layer is None:
            return self.read_layers
        return tuple(n for n in self.read_layers if 0 < n <= self.fork_layer)

    @property
    def num_layers(self) -> int:
        return max((*self.cached_reads, self.fork_layer or 0))


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """A batch: which flat rows its tokens are."""

    index: Tensor  # [rows, tokens] into the flat tensors
    mask: Tensor  # bool [rows, tokens], True: a token of the text
    pair_starts: Tensor  # [rows], as `Extents` has them

    def to(self, device: torch.device) -> Gathered:
        return Gathered(self.index.to(device), self.mask.to(device), self.pair_starts.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where texts lie in the flat tensors."""

    starts: Tensor  # [texts], each text's first flat row; the same for equal texts
    lengths: Tensor  # [texts]
    pair_starts: Tensor  # [texts], the first token of a pair's second text; 0: there is one text

    def of(self, texts: Tensor) -> Extents:
        """`texts`: indices [rows]."""
        return Extents(self.starts[texts], self.lengths[texts], self.pair_starts[texts])

    def to(self, device: torch.device) -> Extents:
        return Extents(self.starts.to(device), self.lengths.to(device), self.pair_starts.to(device))

    def gather(self, texts: Tensor, width: int | None = None) -> Gathered:
        """`texts`: indices [rows]. `width`: tokens that rows are padded to, as many as the longest has at least; None:
        as many as that."""
        own = self.of(texts)
        steps = torch.arange(int(own.lengths.max()) if width is None else width, device=own.starts.device)
        last = own.starts + own.lengths - 1
        index = torch.minimum(own.starts.unsqueeze(1) + steps, last.unsqueeze(1))
        return Gathered(index, steps < own.lengths.unsqueeze(1), own.pair_starts)


@dataclass(frozen=True, slots=True, eq=False)
class StateCache:
    extents: Extents
    reads: dict[int, Tensor]  # layer → [tokens, d]
    fork: Tensor | None  # [tokens, d]

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def lengths(self) -> Tensor:
        """[texts]"""
        return self.extents.lengths

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def gather(self, texts: Tensor, width: int | None = None) -> Gathered:
        """As `Extents` does."""
        return self.extents.gather(texts, width)

    def is_on(self, device: torch.device) -> bool:
        """Whether all states lie there."""
        there = torch.empty(0, device=device).device  # "cuda" is the current one, which has a number
        return all(flat.device == there for flat in (*self.reads.values(), self.fork) if flat is not None)

    def subset(self, texts: Tensor) -> StateCache:
        """A view of these texts [texts] alone: the flat tensors, and what is indexed by token, stay as they are."""
        return StateCache(self.extents.of(texts), self.reads, self.fork)


def states_at(flat: Tensor, batch: Gathered) -> Tensor:
    """[rows, tokens, d] in float32, where `flat` lies; what stands in padding is of some other text and masked."""
    return flat[batch.index.to(flat.device)].float()


@torch.no_grad()
def build_cache(
    backbone: Backbone,
    encodings: Sequence[Encoding],
    plan: CachePlan,
    advance: Callable[[int], None] | None = None,
    begin: tuple[int, Tensor] | None = None,
    once: bool = True,
    batch_tokens: int | None = None,
) -> StateCache:
    """Run every text. `advance` is told of texts done. `batch_tokens`: at once; None: as many as suits the device.

    `begin`: (layers passed, states [tokens, d]) of an earlier run to go on from; None: from the embeddings.
    `once`: a text that stands there several times is run once, and has its states in one place; not so texts of words,
    of which each token has a tag. Raises DataError where the disk lacks room for what MEMORY has no room for.
    """
    firsts, owners = _distinct(encodings) if once else (list(range(len(encodings))), torch.arange(len(encodings)))
    distinct, counts = [encodings[i] for i in firsts], owners.bincount()
    lengths = torch.tensor([len(encoding) for encoding in distinct])
    pair_starts = torch.tensor([encoding.pair_start for encoding in distinct])
    extents = Extents(lengths.cumsum(0) - lengths, lengths, pair_starts)
    total, width = int(lengths.sum()), backbone.spec.hidden_size
    kept = {*plan.cached_reads} | ({plan.fork_layer} if plan.fork_layer is not None else set())
    flat = flat_tensors(kept, total, width, _STORED, backbone.device)
    for texts in _batches(lengths, batch_tokens or _BATCH_TOKENS[backbone.device.type]):
        batch = extents.gather(texts)
        for layer, states in _run(backbone, [distinct[i] for i in texts.tolist()], batch, plan, begin):
            target = flat.get(layer)
            if target is not None:
                seen = states if layer == plan.fork_layer else backbone.read_states(layer, states)
                own = seen[batch.mask.to(seen.device)].to(target.device, _STORED)
                target[batch.index[batch.mask].to(target.device)] = own
        if advance is not None:
            advance(int(counts[texts].sum()))
    fork = None if plan.fork_layer is None else flat[plan.fork_layer]
    return StateCache(extents.of(owners), {layer: flat[layer] for layer in plan.cached_reads}, fork)


def _distinct(encodings: Sequence[Encoding]) -> tuple[list[int], Tensor]:
    """Where each text stands first, and for every text which of those it is, [texts]."""
    firsts: list[int] = []
    known: dict[object, int] = {}
    owners: list[int] = []
    for row, encoding in enumerate(encodings):
        owner = known.setdefault(
            row if encoding.word_ids else (encoding.input_ids, encoding.token_type_ids, encoding.pair_start),
            len(firsts),
        )
        if owner == len(firsts):
            firsts.append(row)
        owners.append(owner)
    return firsts, torch.tensor(owners, dtype=torch.long)


def flat_tensors(
    layers: Collection[int], total: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[int, Tensor]:
    """Layer → [total, width], not yet filled: on a GPU that has much room, in memory where MEMORY has, else in files.

    Raises DataError where the disk has none.
    """
    size = total * width * dtype.itemsize
    needed = size * len(layers)
    if device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE:
        with suppress(torch.OutOfMemoryError):  # another process was faster
            return {layer: torch.empty(total, width, dtype=dtype, device=device) for layer in layers}
    if MEMORY.has_room(needed):
        return {layer: MEMORY.hold(torch.empty(total, width, dtype=dtype)) for layer in layers}
    try:
        return {layer: torch.frombuffer(_disk(size), dtype=dtype).view(total, width) for layer in layers}
    except OSError as error:
        raise DataError(
            f"the states of the texts need {needed:,} bytes of disk, and there is no room for them in "
            f"{tempfile.tempdir or 'any temporary folder'} ({error.strerror}): set TMPDIR to a folder with more room, "
            "give more --memory, or fewer --read-layers"
        ) from error


def _disk(size: int) -> mmap.mmap:
    """An unnamed file in memory's place. Its room is taken at once: a full disk would kill the process later on."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _run(
    backbone: Backbone,
    encodings: Sequence[Encoding],
    batch: Gathered,
    plan: CachePlan,
    begin: tuple[int, Tensor] | None,
) -> Iterator[tuple[int, Tensor]]:
    """(layers passed, states [rows, tokens, d]), from those that it begins with."""
    device = backbone.device
    if begin is None:
        first, states = 0, _embedded(backbone, encodings, batch.mask.shape[1], plan.position_offset)
    else:
        first, states = begin[0], states_at(begin[1], batch).to(device, backbone.dtype)
    yield first, states
    layers = range(first, plan.num_layers)
    mask = batch.mask.to(device)
    yield from run_layers(backbone, states, mask, layers, plan.prefixes, plan.position_offset, frozen=True)


def _embedded(backbone: Backbone, encodings: Sequence[Encoding], width: int, position_offset: int) -> Tensor:
    """[rows, tokens, d]"""
    device = backbone.device
    ids = torch.tensor([e.input_ids + (0,) * (width - len(e)) for e in encodings], device=device)
    types = torch.tensor([e.token_type_ids + (0,) * (width - len(e)) for e in encodings], device=device)
    return backbone.embed(ids, types, positions(backbone, ids, position_offset))


def _batches(lengths: Tensor, most_tokens: int) -> Iterator[Tensor]:
    """Texts by length, as many as fit the token budget."""
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, most_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
