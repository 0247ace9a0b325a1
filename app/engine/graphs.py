"""Small trunks as CUDA graphs: one launch for all of a batch's layers below the first fork.

At few tokens a GPU waits for Python to launch the next kernel. A graph, captured once for a shape, launches them all.
Knows rows of token ids and layers; nothing of tasks, prefixes or requests.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.attention import Segment, additive_mask
from app.engine.backbone import Backbone

log = logging.getLogger(__name__)

MOST_TOKENS = 512  # of all rows; from there on the kernels take longer than their launches
_STEP = 16  # tokens are padded to a multiple, so that few shapes serve all lengths
_MOST_GRAPHS = 64  # kept; each holds its layers' states
_SEEN_BEFORE = 1  # times before a shape is worth a capture, which takes tens of milliseconds

Capture = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], None], list[Tensor]]]


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    tokens: int
    depth: int  # layers
    is_padded: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    input_ids: Tensor  # [rows, tokens], where the captured kernels read it; so all three
    token_type_ids: Tensor
    text_mask: Tensor  # bool [rows, tokens], True: a token of the text
    replay: Callable[[], None]
    states: list[Tensor]  # behind each layer, [rows, tokens, d]: until the next replay of any graph


class TrunkGraphs:
    """Graphs by shape, captured when a shape is met again, the longest unused dropped first.

    To be used by one thread, on one stream: what a replay wrote is read before the next one.
    """

    def __init__(self, backbone: Backbone, capture: Capture | None = None) -> None:
        self._backbone = backbone
        self._capture = capture if capture is not None else _Capturing()
        self._graphs: OrderedDict[_Shape, _Graph] = OrderedDict()
        self._seen: Counter[_Shape] = Counter()
        self._is_possible = True

    def __len__(self) -> int:
        return len(self._graphs)

    def padded(self, rows: int, tokens: int) -> int:
        """The tokens that so many rows are padded to: more than the longest has, where that makes shapes fewer."""
        rounded = min(-(-tokens // _STEP) * _STEP, self._backbone.spec.max_tokens)
        return rounded if rows * rounded <= MOST_TOKENS else tokens

    def run(
        self, input_ids: Tensor, token_type_ids: Tensor, text_mask: Tensor | None, depth: int
    ) -> list[Tensor] | None:
        """States behind each of the first `depth` layers; None where this is not (yet) worth a graph.

        input_ids, token_type_ids: [rows, tokens]; text_mask: bool [rows, tokens], None: nothing is padded.
        """
        rows, tokens = input_ids.shape
        if depth == 0 or rows * tokens > MOST_TOKENS or not self._is_possible:
            return None
        graph = self._graph(_Shape(rows, tokens, depth, text_mask is not None))
        if graph is None:
            return None
        graph.input_ids.copy_(input_ids)
        graph.token_type_ids.copy_(token_type_ids)
        if text_mask is not None:
            graph.text_mask.copy_(text_mask)
        graph.replay()
        return graph.states

    @torch.inference_mode()
    def warm(self, rows: Sequence[int], tokens: Sequence[int], depth: int) -> None:
        """Capture these shapes now, padded and not."""
        for shape in (_Shape(r, t, depth, padded) for r in rows for t in tokens for padded in (False, True)):
            fits = shape.rows * shape.tokens <= MOST_TOKENS and shape.tokens <= self._backbone.spec.max_tokens
            if fits and self._is_possible:
                self._keep(shape)

    def _graph(self, shape: _Shape) -> _Graph | None:
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return self._graphs[shape]
        self._seen[shape] += 1
        if self._seen[shape] <= _SEEN_BEFORE:
            return None
        return self._keep(shape)

    def _keep(self, shape: _Shape) -> _Graph | None:
        """None, now and ever after, where these layers cannot be captured: they run one by one then."""
        if len(self._graphs) == _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[shape] = graph = self._capture_shape(shape)
        except Exception:
            log.exception("this encoder's layers cannot be captured as a CUDA graph, and run without")
            self._is_possible = False
            return None
        return graph

    def _capture_shape(self, shape: _Shape) -> _Graph:
        size, device = (shape.rows, shape.tokens), self._backbone.device
        ids, types = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))
        mask = torch.ones(size, dtype=torch.bool, device=device)
        seen = mask if shape.is_padded else None
        replay, states = self._capture(lambda: run_trunk(self._backbone, ids, types, seen, shape.depth))
        return _Graph(ids, types, mask, replay, states)


def run_trunk(
    backbone: Backbone, input_ids: Tensor, token_type_ids: Tensor, text_mask: Tensor | None, depth: int
) -> list[Tensor]:
    """States [rows, tokens, d] behind each of the first `depth` layers, no prefix beside any row."""
    rows, tokens = input_ids.shape
    positions = torch.arange(tokens, device=backbone.device).expand(rows, -1)
    states = backbone.embed(input_ids, token_type_ids, positions)
    context = {} if all(backbone.fused_layers[:depth]) else backbone.context(states, positions)
    masks: dict[int | None, Tensor | None] = {}
    found = []
    for layer in range(depth):
        window = backbone.window(layer)
        if window not in masks:
            masks[window] = additive_mask(text_mask, tokens, window, 0, backbone.like)
        states = backbone.serve_layer(layer, states, [Segment(0, rows, None, None, masks[window])], context)
        found.append(states)
    return found


class _Capturing:
    """CUDA graphs of one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made at a first call must not be captured
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads load versions meanwhile: their allocations are not this graph's fault.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            states = run()
        return graph.replay, states
