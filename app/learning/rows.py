"""Rows of hidden states through layers of the frozen backbone, with prefixes before their keys and values.

The one-prefix-for-all-rows case of the engine's forward pass, open to autograd. Knows tensors; nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from app.engine import attention
from app.engine.attention import Segment, additive_mask, attend
from app.engine.backbone import Backbone

_RECORDING = "manifold_recording"


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
) -> Iterator[tuple[int, Tensor]]:
    """(number of layers passed, states) behind each of `layers`."""
    context = backbone.context(states, positions(backbone, mask, position_offset))
    for layer in layers:
        segment = _segment(backbone, layer, mask, prefixes)
        states = backbone.run_layer(layer, states, [segment], context)
        yield layer + 1, states


def _segment(backbone: Backbone, layer: int, mask: Tensor, prefixes: Sequence[LayerPrefix]) -> Segment:
    rows = mask.shape[0]
    seen = [
        p.vectors[layer - p.first_layer].to(backbone.device, backbone.dtype) for p in prefixes if p.first_layer <= layer
    ]
    if not seen:
        return Segment(0, rows, None, None, _visible(backbone, layer, mask, 0))
    joined = torch.cat(seen, dim=2)  # [2, heads, virtual tokens, head size]
    key, value = (side.expand(rows, -1, -1, -1) for side in joined)
    return Segment(0, rows, key, value, _visible(backbone, layer, mask, joined.shape[2]))


def _visible(backbone: Backbone, layer: int, mask: Tensor, num_virtual_tokens: int) -> Tensor | None:
    text = None if bool(mask.all()) else mask
    return additive_mask(text, mask.shape[1], backbone.window(layer), num_virtual_tokens, backbone.like)


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
    config = backbone.family.config
    _recorded.clear()
    config._attn_implementation = _RECORDING
    try:
        yield _recorded
    finally:
        config._attn_implementation = attention.NAME
