"""Rows of hidden states through layers of the frozen backbone, with prefixes before their keys and values.

The one-prefix-for-all-rows case of the engine's forward pass, open to autograd. Knows tensors; nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from app.engine import attention
from app.engine.attention import Segment, additive_mask, attend
from app.engine.backbone import Backbone

_RECORDING, _PLAIN = "manifold_recording", "manifold_plain"


@dataclass(frozen=True, slots=True, eq=False)
class LayerPrefix:
    """A prefix that rows see from `first_layer` on."""

    first_layer: int
    vectors: Tensor  # [layers, 2, heads, virtual tokens, head size]
    digest: str = ""  # of one that does not change

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.vectors.shape[3])


def positions(backbone: Backbone, like: Tensor, offset: int) -> Tensor:
    """Positions counted from `offset`, for rows [rows, tokens]."""
    num_rows, num_tokens = like.shape
    base = torch.arange(num_tokens, device=backbone.device) + offset
    return base.clamp(max=backbone.spec.max_tokens - 1).expand(num_rows, -1)


def run_layers(
    backbone: Backbone,
    states: Tensor,  # [rows, tokens, d] after `start` layers
    mask: Tensor,  # bool [rows, tokens], True: a token of the text
    layers: range,
    prefixes: Sequence[LayerPrefix] = (),
    position_offset: int = 0,
    *,
    frozen: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """(number of layers passed, states) behind each of `layers`. `frozen`: as they are served, without gradients."""
    context = backbone.context(states, positions(backbone, mask, position_offset))
    run = backbone.serve_layer if frozen else backbone.run_layer
    seen = _Visible(backbone, mask)
    for layer in layers:
        segment = _segment(backbone, layer, seen, prefixes)
        states = run(layer, states, [segment], context)
        yield layer + 1, states


def _segment(backbone: Backbone, layer: int, seen: _Visible, prefixes: Sequence[LayerPrefix]) -> Segment:
    rows = seen.mask.shape[0]
    here = [
        p.vectors[layer - p.first_layer].to(backbone.device, backbone.dtype) for p in prefixes if p.first_layer <= layer
    ]
    if not here:
        return Segment(0, rows, None, None, seen.of(layer, 0))
    joined = torch.cat(here, dim=2)  # [2, heads, virtual tokens, head size]
    key, value = (side.expand(rows, -1, -1, -1) for side in joined)
    return Segment(0, rows, key, value, seen.of(layer, joined.shape[2]))


class _Visible:
    """What tokens of some rows see: a mask for all layers that are alike in it."""

    def __init__(self, backbone: Backbone, mask: Tensor) -> None:
        self.mask = mask
        is_full = mask.device.type == "cpu" and bool(mask.all())  # on another device the answer would be waited for
        self._text = None if is_full else mask
        self._backbone = backbone
        self._made: dict[tuple[int | None, int], Tensor | None] = {}

    def of(self, layer: int, num_virtual_tokens: int) -> Tensor | None:
        window, like = self._backbone.window(layer), self._backbone.like
        key = window, num_virtual_tokens
        if key not in self._made:
            self._made[key] = additive_mask(self._text, self.mask.shape[1], window, num_virtual_tokens, like)
        return self._made[key]


# -- keys and values of real text --------------------------------------------------------------------------------------

_recorded: list[tuple[Tensor, Tensor]] = []


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
    _recorded.append((key, value))
    return attend(module, query, key, value, *rest, **named)


AttentionInterface.register(_RECORDING, _record)
AttentionMaskInterface.register(_RECORDING, sdpa_mask)


@contextmanager
def recorded_keys_values(backbone: Backbone) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, each layer run adds its keys and values, [rows, heads, tokens, head size] each, to the list."""
    _recorded.clear()
    with _attention(backbone, _RECORDING):
        yield _recorded


@contextmanager
def _attention(backbone: Backbone, name: str) -> Iterator[None]:
    config = backbone.family.config
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = attention.NAME


# -- attention that is trained through ---------------------------------------------------------------------------------


def differentiable_attention(backbone: Backbone) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward takes longer than all else, and torch's own plain one looks for rows
    that see nothing, which a prefix never leaves: bare products take a third off a training step."""
    if backbone.device.type == "cpu" and torch.is_grad_enabled():
        return _attention(backbone, _PLAIN)
    return nullcontext()


def _attend_plainly(
    module: nn.Module,  # noqa: ARG001 - transformers' attention interface passes it
    query: Tensor,  # [rows, heads, tokens, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the segment has it
    *,
    scaling: float | None = None,
    segments: Sequence[Segment],
    **_: Any,
) -> tuple[Tensor, None]:
    (segment,) = segments
    if segment.key is not None and segment.value is not None:
        key, value = torch.cat((segment.key, key), dim=2), torch.cat((segment.value, value), dim=2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if segment.mask is not None:
        scores = scores + segment.mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register(_PLAIN, _attend_plainly)
AttentionMaskInterface.register(_PLAIN, sdpa_mask)
