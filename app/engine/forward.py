"""One batch through the backbone: embed, run each layer with its rows' prefixes, read.

Knows tensors and the batch's layout; nothing of requests, queues or threads.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from app.domain import Encoding, ReadoutKind, TaskOutput
from app.engine.attention import Segment, additive_mask, cat_tokens
from app.engine.backbone import Backbone
from app.engine.batch import Batch, Block, Chunk, LayerStep, Placed, Read, Readers
from app.engine.families import Context
from app.engine.graphs import TrunkGraphs
from app.engine.heads import attend_sides, attend_tokens, compare_sides, mean_tokens, sides_of
from app.engine.scoring import Pieces, Scores, score

_STEP = 16  # products run over a multiple of so many tokens, so that few kernels serve all lengths
_MOST_PRESENT = 0.95  # share of rows × tokens that are a text's own, from which on leaving padding out gains nothing


def run_batch(batch: Batch, backbone: Backbone) -> list[tuple[TaskOutput, ...]]:
    """The outputs of each work of `batch.works`, in the order of its plan's versions."""
    return begin_batch(batch, backbone).scores.outputs()


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A batch that the device has been given, and what tells how long its layers take."""

    scores: Scores
    layers_s: float  # until the layers were handed over; on a CPU, computed
    heads_s: float  # the same of the heads
    started: torch.cuda.Event | None

    def forward_s(self) -> float:
        """Waits for the device. On a CUDA device its own time, heads included."""
        arrived = self.scores.wait()
        if self.started is None or arrived is None:
            return self.layers_s
        return float(self.started.elapsed_time(arrived)) / 1000


@torch.inference_mode()
def begin_batch(batch: Batch, backbone: Backbone, graphs: TrunkGraphs | None = None) -> Begun:
    """Hand a batch to the device: a CPU has computed it on return, a CUDA device computes while others are prepared."""
    began_s = time.perf_counter()
    started = None
    if backbone.device.type == "cuda":
        started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        started.record()
    pieces = run_layers(batch, backbone, graphs)
    layers_s = time.perf_counter() - began_s
    scores = score(batch, pieces)
    return Begun(scores, layers_s, time.perf_counter() - began_s - layers_s, started)


def run_layers(batch: Batch, backbone: Backbone, graphs: TrunkGraphs | None = None) -> Pieces:
    inputs = _Inputs.of(batch, backbone)
    trunk = None if graphs is None else inputs.trunk(graphs, batch.steps)
    pieces: Pieces = {}
    states: list[Tensor] = []  # of each chunk, [rows, tokens, d]
    for layer, step in enumerate(batch.steps):
        if trunk is not None and layer < len(trunk):
            states = [trunk[layer]]
        else:
            states = [inputs.embed(c) if layer == 0 else _gather(states, c) for c in step]
            states = [
                backbone.serve_layer(
                    layer,
                    rows,
                    inputs.segments(layer, chunk),
                    inputs.context(layer, chunk, rows),
                    chunk.only_first,
                    inputs.tokens(chunk),
                )
                for rows, chunk in zip(states, step, strict=True)
            ]
        if layer + 1 in batch.reads:
            _take_all(batch, layer + 1, step, states, inputs, pieces)
    return pieces


def _trunk_depth(steps: Sequence[LayerStep]) -> int:
    """Layers through which one chunk goes whose rows stand as the texts do, no prefix beside any of them."""
    depth = 0
    for layer, step in enumerate(steps):
        if len(step) != 1 or step[0].only_first or not all(_is_bare(placed, layer) for placed in step[0].placed):
            break
        depth += 1
    return depth


def _is_bare(placed: Placed, layer: int) -> bool:
    block = placed.block
    as_texts = (placed.start, placed.stop) == (block.plans.start, block.plans.stop) and block.row.position_offset == 0
    return as_texts and block.virtual_tokens(layer) == 0


def _gather(states: Sequence[Tensor], chunk: Chunk) -> Tensor:
    parts = [states[number][rows] for number, rows in chunk.sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(slots=True)
class _Inputs:
    """The batch's token tensors, and the masks that its layers share."""

    backbone: Backbone
    encodings: Sequence[Encoding]  # of the plans
    input_ids: Tensor  # [plans, tokens]
    token_type_ids: Tensor
    text_mask: Tensor | None  # bool [plans, tokens], True: a token of the text; None: nothing is padded
    masks: dict[tuple[object, ...], Tensor | None]
    contexts: dict[tuple[object, ...], Context]
    places: dict[tuple[object, ...], Tensor | None]
    both_sides: Tensor | None = None  # of all plans, as `sides_of` has them; None: nobody has asked for them yet

    @classmethod
    def of(cls, batch: Batch, backbone: Backbone) -> _Inputs:
        encodings = [work.plan.encoding for work in batch.works]
        width = batch.num_tokens
        ids = _padded([e.input_ids for e in encodings], width)
        types = _padded([e.token_type_ids for e in encodings], width)
        lengths = torch.tensor([len(e) for e in encodings])
        mask = None if bool((lengths == width).all()) else torch.arange(width) < lengths.unsqueeze(1)
        return cls(
            backbone,
            encodings,
            backbone.bring(ids),
            backbone.bring(types),
            None if mask is None else backbone.bring(mask),
            masks={},
            contexts={},
            places={},
        )

    def trunk(self, graphs: TrunkGraphs, steps: Sequence[LayerStep]) -> list[Tensor] | None:
        """States behind each layer below the first fork, where a graph has them in one launch."""
        return graphs.run(self.input_ids, self.token_type_ids, self.text_mask, _trunk_depth(steps))

    def embed(self, chunk: Chunk) -> Tensor:
        ids = torch.cat([self.input_ids[p.block.plans] for p in chunk.placed])
        types = torch.cat([self.token_type_ids[p.block.plans] for p in chunk.placed])
        return self.backbone.embed(ids, types, self._positions(chunk))

    def context(self, layer: int, chunk: Chunk, states: Tensor) -> Context:
        if self.backbone.fused_layers[layer] is not None:
            return {}
        layout = _layout(chunk.placed)
        if layout not in self.contexts:
            self.contexts[layout] = self.backbone.context(states, self._positions(chunk))
        return self.contexts[layout]

    def _positions(self, chunk: Chunk) -> Tensor:
        """[rows, tokens], each row's position offset added. Padding repeats positions: nothing attends to it."""
        width = self.input_ids.shape[1]
        base = torch.arange(width, device=self.backbone.device)
        limit = self.backbone.spec.max_tokens - 1
        rows = [(base + p.block.row.position_offset).clamp(max=limit).expand(p.block.size, -1) for p in chunk.placed]
        return torch.cat(rows)

    def segments(self, layer: int, chunk: Chunk) -> list[Segment]:
        return [
            self._segment(layer, num_virtual_tokens, list(members))
            for num_virtual_tokens, members in groupby(chunk.placed, lambda p: p.block.virtual_tokens(layer))
        ]

    def _segment(self, layer: int, num_virtual_tokens: int, members: Sequence[Placed]) -> Segment:
        mask = self._mask(num_virtual_tokens, members, self.backbone.window(layer))
        if num_virtual_tokens == 0:
            return Segment(members[0].start, members[-1].stop, None, None, mask)
        sides = zip(*(_block_prefix(p.block, layer) for p in members), strict=True)
        key, value = (cat_tokens(side, dim=0) if len(members) > 1 else side[0] for side in sides)
        return Segment(members[0].start, members[-1].stop, key, value, mask)

    def tokens(self, chunk: Chunk) -> Tensor | None:
        """Where the texts' own tokens stand among the chunk's rows × tokens; None where computing all is cheaper.

        On a CUDA device it is: there the copies that leave padding out take as long as what they spare.
        """
        if self.text_mask is None or self.backbone.device.type != "cpu":
            return None
        layout = _layout(chunk.placed)
        if layout not in self.places:
            mask = self.mask_of(chunk.placed)
            self.places[layout] = None if mask is None else _places(mask)
        return self.places[layout]

    def mask_of(self, members: Sequence[Placed]) -> Tensor | None:
        """bool [rows, tokens], True: a token of the text; None: nothing is padded."""
        if self.text_mask is None:
            return None
        parts = [self.text_mask[p.block.plans] for p in members]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sides(self, block: Block) -> Tensor:
        """bool [rows, 2, tokens]: which tokens are the first text's of a pair, and which the second's."""
        if self.both_sides is None:
            starts = self.backbone.bring(torch.tensor([encoding.pair_start for encoding in self.encodings]))
            mask = self.text_mask
            self.both_sides = sides_of(
                torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask, starts
            )
        return self.both_sides[block.plans]

    def _mask(self, num_virtual_tokens: int, members: Sequence[Placed], window: int | None) -> Tensor | None:
        layout = (num_virtual_tokens, window, *_layout(members))
        if layout not in self.masks:
            text = self.mask_of(members)
            width, like = self.input_ids.shape[1], self.backbone.like
            self.masks[layout] = additive_mask(text, width, window, num_virtual_tokens, like)
        return self.masks[layout]


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """[rows, width], zeros behind each row's numbers. An array takes them in a fifth of the time of torch.tensor."""
    if not any(map(any, rows)):
        return torch.zeros(len(rows), width, dtype=torch.long)
    numbers = array("q")
    for row in rows:
        numbers.extend(row)
        numbers.extend((0,) * (width - len(row)))
    return torch.frombuffer(numbers, dtype=torch.long).view(len(rows), width)


def _places(mask: Tensor) -> Tensor | None:
    """bool [rows, tokens] → the places of True, flat. A few stand there twice: see `_STEP`."""
    places = mask.flatten().nonzero().squeeze(1)
    places = torch.cat([places, places[: -len(places) % _STEP]])
    return places if len(places) < _MOST_PRESENT * mask.numel() else None


def _layout(members: Sequence[Placed]) -> tuple[tuple[int, int], ...]:
    return tuple((p.block.cohort, p.block.index) for p in members)


def _block_prefix(block: Block, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, heads, virtual tokens, head size] of all prefixes that have begun, side by side."""
    parts = [part for part in (prefix.at(layer) for prefix in block.prefixes) if part is not None]
    key, value = parts[0] if len(parts) == 1 else (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return key.expand(block.size, -1, -1, -1), value.expand(block.size, -1, -1, -1)


# -- readouts ----------------------------------------------------------------------------------------------------------


_POOLED = frozenset({ReadoutKind.MEAN, ReadoutKind.ATTENTION})


def _take_all(
    batch: Batch, layer: int, step: LayerStep, states: Sequence[Tensor], inputs: _Inputs, pieces: Pieces
) -> None:
    """What each reader finds behind one layer goes to its pieces.

    [rows, readouts, n, d] each; for those that read every token [rows, tokens, d].
    """
    where = {p.block: (number, p) for number, chunk in enumerate(step) for p in chunk.placed}
    reads = [(*where[read.block], read) for read in batch.reads[layer]]
    means = _means(reads, states, layer, inputs)
    for number, placed, read in reads:
        seen = inputs.backbone.read_states(layer, states[number][placed.start : placed.stop])
        for readers, found in _take(read, seen, means.get(read.block), layer, inputs):
            pieces.setdefault(readers, []).extend(found)


def _means(
    reads: Sequence[tuple[int, Placed, Read]], states: Sequence[Tensor], layer: int, inputs: _Inputs
) -> dict[Block, Tensor]:
    """Each block's mean over its tokens, [rows, 1, d]: blocks that stand side by side in one operation."""
    wanted = [(n, p) for n, p, read in reads if any(readers.readout.kind in _POOLED for readers in read.readers)]
    wanted.sort(key=lambda item: (item[0], item[1].start))
    means: dict[Block, Tensor] = {}
    for number, members in _neighbours(wanted):
        start = members[0].start
        mask = inputs.mask_of(members)
        seen = inputs.backbone.read_states(layer, states[number][start : members[-1].stop])
        mean = mean_tokens(seen, mask)
        means.update({p.block: mean[p.start - start : p.stop - start] for p in members})
    return means


def _neighbours(placed: Sequence[tuple[int, Placed]]) -> Iterator[tuple[int, list[Placed]]]:
    """Runs of one chunk without a gap."""
    run: list[Placed] = []
    for index, (number, member) in enumerate(placed):
        if run and (number != placed[index - 1][0] or member.start != run[-1].stop):
            yield placed[index - 1][0], run
            run = []
        run.append(member)
    if run:
        yield placed[-1][0], run


def _take(
    read: Read, states: Tensor, mean: Tensor | None, layer: int, inputs: _Inputs
) -> Iterator[tuple[Readers, list[Tensor]]]:
    """What each of a block's readers finds in its states [rows, tokens, d] behind one layer."""
    if mean is not None:
        yield from _pool(read, states, mean, layer, inputs)
    if any(readers.readout.kind is ReadoutKind.MATCHING for readers in read.readers):
        yield from _match(read, states, layer, inputs)
    for readers in read.readers:
        match readers.readout.kind:
            case ReadoutKind.CLS:
                yield readers, [_for_each(readers, states[:, :1].float())]
            case ReadoutKind.POOLER:
                yield readers, [_for_each(readers, inputs.backbone.pool(states).float().unsqueeze(1))]
            case ReadoutKind.TOKENS:
                yield readers, [states.float()]


def _pool(
    read: Read, states: Tensor, mean: Tensor, layer: int, inputs: _Inputs
) -> Iterator[tuple[Readers, list[Tensor]]]:
    """The mean, and what the readers' own queries find: one matrix product for all queries of all versions."""
    all_readers = [readers for readers in read.readers if readers.readout.kind in _POOLED]
    queries = _queries(all_readers, layer)
    mask = None if inputs.text_mask is None else inputs.text_mask[read.block.plans]
    attended = attend_tokens(states, torch.cat(queries), mask) if queries else mean
    start = 0
    for readers in all_readers:
        found = [_for_each(readers, mean)]
        if readers.readout.num_queries:
            stop = start + readers.num_readouts * readers.readout.num_queries
            found.append(attended[:, start:stop].view(len(mean), readers.num_readouts, readers.readout.num_queries, -1))
            start = stop
        yield readers, found


def _match(read: Read, states: Tensor, layer: int, inputs: _Inputs) -> Iterator[tuple[Readers, list[Tensor]]]:
    """Of each text of a pair what `_pool` finds in the whole, and how the two differ."""
    all_readers = [readers for readers in read.readers if readers.readout.kind is ReadoutKind.MATCHING]
    found = attend_sides(states, torch.cat(_queries(all_readers, layer)), inputs.sides(read.block))
    mean, attended = found[:, :, :1], found[:, :, 1:]  # [rows, 2, 1, d], [rows, 2, all queries, d]
    start = 0
    for readers in all_readers:
        count, num_queries = readers.num_readouts, readers.readout.num_queries
        own = attended[:, :, start : start + count * num_queries].view(len(found), 2, count, num_queries, -1)
        start += count * num_queries
        sides = torch.cat((mean.unsqueeze(2).expand(-1, -1, count, -1, -1), own), dim=3)
        yield readers, [compare_sides(sides.transpose(1, 2))]


def _queries(all_readers: Sequence[Readers], layer: int) -> list[Tensor]:
    """Each version's of one layer, [members × queries, d]."""
    return [
        resident.head.queries[readers.readout.layers.index(layer)]
        for readers in all_readers
        for resident in readers.residents
        if resident.head.queries is not None
    ]


def _for_each(readers: Readers, found: Tensor) -> Tensor:
    """[rows, n, d] → [rows, readouts, n, d], the same for every member of every version."""
    return found.unsqueeze(1).expand(-1, readers.num_readouts, -1, -1)
