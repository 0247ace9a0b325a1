"""One batch through the backbone: embed, run each layer with its rows' prefixes, read, score.

Knows tensors and the batch's layout; nothing of requests, queues or threads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from app.domain import ProblemType, ReadoutKind, TaskOutput
from app.engine.attention import Segment
from app.engine.backbone import Backbone
from app.engine.batch import Batch, Block, Chunk, LayerStep, Placed, Read, Readers, Work
from app.engine.families import Context
from app.engine.heads import join_layers, pool_tokens, scores_of
from app.engine.prefix_bank import ResidentVersion

log = logging.getLogger(__name__)

_Pieces = dict[Readers, list[Tensor]]  # what each reads, layer by layer

_NOT_FINITE = TaskOutput(error="its scores are not finite")


@torch.inference_mode()
def run_batch(batch: Batch, backbone: Backbone) -> list[tuple[TaskOutput, ...]]:
    """The outputs of each work of `batch.works`, in the order of its plan's versions."""
    return _outputs(batch, _run_layers(batch, backbone))


def _run_layers(batch: Batch, backbone: Backbone) -> _Pieces:
    inputs = _Inputs.of(batch, backbone)
    pieces: _Pieces = {}
    states: list[Tensor] = []  # of each chunk, [rows, tokens, d]
    for layer, step in enumerate(batch.steps):
        states = [inputs.embed(c) if layer == 0 else _gather(states, c) for c in step]
        states = [
            backbone.run_layer(layer, rows, inputs.segments(layer, chunk), inputs.context(chunk, rows))
            for rows, chunk in zip(states, step, strict=True)
        ]
        if layer + 1 in batch.reads:
            _take_all(batch, layer + 1, step, states, inputs, pieces)
    return pieces


def _gather(states: Sequence[Tensor], chunk: Chunk) -> Tensor:
    parts = [states[number][rows] for number, rows in chunk.sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(slots=True)
class _Inputs:
    """The batch's token tensors, and the masks that its layers share."""

    backbone: Backbone
    input_ids: Tensor  # [plans, tokens]
    token_type_ids: Tensor
    text_mask: Tensor | None  # bool [plans, tokens], True: a token of the text; None: nothing is padded
    masks: dict[tuple[object, ...], Tensor | None]
    contexts: dict[tuple[object, ...], Context]

    @classmethod
    def of(cls, batch: Batch, backbone: Backbone) -> _Inputs:
        encodings = [work.plan.encoding for work in batch.works]
        width = batch.num_tokens
        ids = torch.tensor([e.input_ids + (0,) * (width - len(e)) for e in encodings])
        types = torch.tensor([e.token_type_ids + (0,) * (width - len(e)) for e in encodings])
        lengths = torch.tensor([len(e) for e in encodings])
        mask = None if bool((lengths == width).all()) else torch.arange(width) < lengths.unsqueeze(1)
        device = backbone.device
        return cls(backbone, ids.to(device), types.to(device), None if mask is None else mask.to(device), {}, {})

    def embed(self, chunk: Chunk) -> Tensor:
        ids = torch.cat([self.input_ids[p.block.plans] for p in chunk.placed])
        types = torch.cat([self.token_type_ids[p.block.plans] for p in chunk.placed])
        return self.backbone.embed(ids, types, self._positions(chunk))

    def context(self, chunk: Chunk, states: Tensor) -> Context:
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
        key, value = (torch.cat(side) if len(members) > 1 else side[0] for side in sides)
        return Segment(members[0].start, members[-1].stop, key, value, mask)

    def _mask(self, num_virtual_tokens: int, members: Sequence[Placed], window: int | None) -> Tensor | None:
        layout = (num_virtual_tokens, window, *_layout(members))
        if layout not in self.masks:
            self.masks[layout] = self._build_mask(num_virtual_tokens, members, window)
        return self.masks[layout]

    def _build_mask(self, num_virtual_tokens: int, members: Sequence[Placed], window: int | None) -> Tensor | None:
        """0 where a token may look and -inf elsewhere, [rows, 1, 1 or tokens, virtual tokens + tokens]."""
        width, device = self.input_ids.shape[1], self.backbone.device
        sees: Tensor | None = None
        if self.text_mask is not None:
            sees = torch.cat([self.text_mask[p.block.plans] for p in members])[:, None, None, :]
        if window is not None and width > window + 1:
            index = torch.arange(width, device=device)
            near = (index[:, None] - index[None, :]).abs() <= window
            sees = near[None, None] if sees is None else sees & near
        if sees is None:
            return None
        text = torch.zeros(sees.shape, dtype=self.backbone.dtype, device=device).masked_fill(~sees, float("-inf"))
        return torch.nn.functional.pad(text, (num_virtual_tokens, 0))


def _layout(members: Sequence[Placed]) -> tuple[tuple[int, int], ...]:
    return tuple((p.block.cohort, p.block.index) for p in members)


def _block_prefix(block: Block, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, heads, virtual tokens, head size] of all prefixes that have begun, side by side."""
    parts = [part for part in (prefix.at(layer) for prefix in block.prefixes) if part is not None]
    key, value = parts[0] if len(parts) == 1 else (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return key.expand(block.size, -1, -1, -1), value.expand(block.size, -1, -1, -1)


# -- readouts ----------------------------------------------------------------------------------------------------------


def _take_all(
    batch: Batch, layer: int, step: LayerStep, states: Sequence[Tensor], inputs: _Inputs, pieces: _Pieces
) -> None:
    where = {p.block: (number, slice(p.start, p.stop)) for number, chunk in enumerate(step) for p in chunk.placed}
    for read in batch.reads[layer]:
        number, rows = where[read.block]
        seen = inputs.backbone.read_states(layer, states[number][rows])
        for readers, found in _take(read, seen, layer, inputs):
            pieces.setdefault(readers, []).extend(found)


def _take(read: Read, states: Tensor, layer: int, inputs: _Inputs) -> Iterator[tuple[Readers, list[Tensor]]]:
    """What each of a block's readers finds in its states [rows, tokens, d] behind one layer.

    [rows, versions, n, d] each; for those that read every token [rows, tokens, d].
    """
    pooled = [r for r in read.readers if r.readout.kind in (ReadoutKind.MEAN, ReadoutKind.ATTENTION)]
    if pooled:
        mask = None if inputs.text_mask is None else inputs.text_mask[read.block.plans]
        yield from _pool(pooled, states, layer, mask)
    for readers in read.readers:
        match readers.readout.kind:
            case ReadoutKind.CLS:
                yield readers, [_for_each(readers, states[:, :1].float())]
            case ReadoutKind.POOLER:
                yield readers, [_for_each(readers, inputs.backbone.pool(states).float().unsqueeze(1))]
            case ReadoutKind.TOKENS:
                yield readers, [states.float()]


def _pool(
    all_readers: Sequence[Readers], states: Tensor, layer: int, mask: Tensor | None
) -> Iterator[tuple[Readers, list[Tensor]]]:
    """The mean, and what the readers' own queries find: one matrix product for all queries of all versions."""
    queries = [
        resident.head.queries[readers.readout.layers.index(layer)]
        for readers in all_readers
        for resident in readers.residents
        if resident.head.queries is not None
    ]
    mean, *attended = pool_tokens(states, torch.cat(queries) if queries else None, mask)
    start = 0
    for readers in all_readers:
        found = [_for_each(readers, mean)]
        if readers.readout.num_queries:
            stop = start + len(readers.versions) * readers.readout.num_queries
            found.append(attended[0][:, start:stop].unflatten(1, (len(readers.versions), -1)))
            start = stop
        yield readers, found


def _for_each(readers: Readers, found: Tensor) -> Tensor:
    """[rows, n, d] → [rows, versions, n, d], the same for every version."""
    return found.unsqueeze(1).expand(-1, len(readers.versions), -1, -1)


# -- heads -------------------------------------------------------------------------------------------------------------


def _outputs(batch: Batch, pieces: _Pieces) -> list[tuple[TaskOutput, ...]]:
    """All scores leave the device in one transfer."""
    scores: dict[tuple[int, int], Tensor] = {}  # (cohort, version) → [rows, labels]; [rows, tokens, 2] for tokens
    for readers, found in pieces.items():
        for version, here in _scores(readers, found):
            scores[readers.cohort, version] = here
    on_host, all_finite = _to_host(list(scores.values()))
    columns = dict(zip(scores, on_host, strict=True))
    outputs: list[tuple[TaskOutput, ...]] = []
    for number, cohort in enumerate(batch.cohorts):
        works = batch.works[cohort.plans]
        of_versions = [
            _column(resident, columns.get((number, index)), works, all_finite)
            for index, resident in enumerate(cohort.residents)
        ]
        outputs.extend(zip(*of_versions, strict=True))
    return outputs


def _scores(readers: Readers, pieces: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(version, its scores). A version that breaks is left out, and breaks alone."""
    is_token = readers.readout.kind is ReadoutKind.TOKENS
    features = torch.cat(tuple(pieces), dim=-1) if is_token else join_layers(pieces)
    for position, (version, resident) in enumerate(zip(readers.versions, readers.residents, strict=True)):
        try:
            logits = resident.head.logits(features if is_token else features[:, position])
            scores = scores_of(resident.version.problem_type, logits)
            if is_token:
                best = scores.max(dim=-1)
                scores = torch.stack((best.values, best.indices.to(best.values.dtype)), dim=-1)
        except Exception:  # a fault of one version's tensors must not reach the batch's other tasks
            log.exception("version %s failed", resident.version.digest)
        else:
            yield version, scores


def _to_host(scores: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The tensors on the host, and whether all their numbers are finite."""
    if not scores:
        return [], True
    flat = torch.cat([tensor.flatten() for tensor in scores]).cpu()
    parts = flat.split([tensor.numel() for tensor in scores])
    return [part.view(tensor.shape) for part, tensor in zip(parts, scores, strict=True)], bool(flat.isfinite().all())


def _column(
    resident: ResidentVersion, scores: Tensor | None, works: Sequence[Work], all_finite: bool
) -> list[TaskOutput]:
    """One version's outputs for its cohort's texts."""
    if scores is None:
        return [TaskOutput(error="it failed while computing; the server's log says why")] * len(works)
    cut = _token_output if resident.version.problem_type is ProblemType.TOKEN else _output
    return [cut(row, len(work.plan.encoding), all_finite) for row, work in zip(scores.tolist(), works, strict=True)]


def _output(scores: list[float], _: int, is_finite: bool) -> TaskOutput:
    return TaskOutput(tuple(scores)) if is_finite or all(map(math.isfinite, scores)) else _NOT_FINITE


def _token_output(found: list[list[float]], num_tokens: int, is_finite: bool) -> TaskOutput:
    """Each token's tag and its probability, padding left out."""
    scores, tags = zip(*found[:num_tokens], strict=True)
    return TaskOutput(scores, tuple(map(int, tags))) if is_finite or all(map(math.isfinite, scores)) else _NOT_FINITE
