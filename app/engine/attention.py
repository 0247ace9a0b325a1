"""The attention function that gives each row of a batch its own prefix keys and values.

It is registered with transformers' attention interface, so every family that uses the interface takes prefixes.
Knows tensors and row ranges; nothing of tasks, plans or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "manifold"


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows whose prefixes have one length at this layer, so that no prefix is ever padded."""

    start: int  # rows [start, stop) of the batch
    stop: int
    key: Tensor | None  # [stop - start, heads, virtual tokens, head size]; None: these rows have no prefix here
    value: Tensor | None
    mask: Tensor | None  # [rows, 1, 1 or tokens, virtual tokens + tokens]: 0 may be seen, -inf not; None: all may


def attend(
    module: nn.Module,  # noqa: ARG001 - transformers' attention interface passes it
    query: Tensor,  # [rows, heads, tokens, head size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    **_: Any,  # what else a family passes (causality, windows): the segments' masks say it all
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over each row's prefix and text → [rows, tokens, heads, head size]."""
    if segments is None:
        segments = (Segment(0, query.shape[0], None, None, attention_mask),)
    parts = [_attend(query, key, value, segment, scaling, dropout) for segment in segments]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, segment: Segment, scaling: float | None, dropout: float
) -> Tensor:
    rows = slice(segment.start, segment.stop)
    query, key, value = query[rows], key[rows], value[rows]
    if segment.key is not None and segment.value is not None:
        key, value = torch.cat((segment.key, key), dim=2), torch.cat((segment.value, value), dim=2)
    states = scaled_dot_product_attention(query, key, value, attn_mask=segment.mask, dropout_p=dropout, scale=scaling)
    return states.transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
