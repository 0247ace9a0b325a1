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
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "manifold"
_WIDE = torch.complex128
_LARGE = 2**18  # numbers; copies of fewer take as long as their launch


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows whose prefixes have one length at this layer, so that no prefix is ever padded."""

    start: int  # rows [start, stop) of the batch
    stop: int
    key: Tensor | None  # [stop - start, heads, virtual tokens, head size]; None: these rows have no prefix here
    value: Tensor | None
    mask: Tensor | None  # [rows, 1, 1 or tokens, virtual tokens + tokens]: 0 may be seen, -inf not; None: all may


def attend(
    module: nn.Module | None,  # noqa: ARG001 - transformers' attention interface passes it
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
        key, value = cat_tokens((segment.key, key)), cat_tokens((segment.value, value))
    states = scaled_dot_product_attention(query, key, value, attn_mask=segment.mask, dropout_p=dropout, scale=scaling)
    return states.transpose(1, 2)


def cat_tokens(parts: Sequence[Tensor], dim: int = 2) -> Tensor:
    """Keys or values, [..., head size] each, along one of their other dimensions.

    On a CUDA device in steps of 16 bytes: torch would copy strided tensors number by number, six times slower.
    """
    if parts[-1].is_cuda and may_go_wide(parts):
        return cat_wide(parts, dim)
    return torch.cat(tuple(parts), dim=dim)


def may_go_wide(parts: Sequence[Tensor]) -> bool:
    """Whether that is faster and the same: not where a gradient goes through any, which `cat_wide` would lose."""
    is_learned = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    return parts[-1].numel() >= _LARGE and not is_learned and all(map(is_wide, parts))


def cat_wide(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Without gradients: numbers seen as others have none."""
    return torch.cat([part.view(_WIDE) for part in parts], dim=dim).view(parts[0].dtype)


def is_wide(part: Tensor) -> bool:
    """Whether every run of the last dimension is a whole number of aligned steps."""
    numbers = _WIDE.itemsize // part.element_size()
    sizes = (part.shape[-1], part.storage_offset(), *part.stride()[:-1])
    return part.stride(-1) == 1 and all(size % numbers == 0 for size in sizes)


def additive_mask(
    text: Tensor | None, num_tokens: int, window: int | None, num_virtual_tokens: int, like: Tensor
) -> Tensor | None:
    """0 where a token may look and -inf elsewhere, [rows, 1, 1 or tokens, virtual tokens + tokens]; None: everywhere.

    text: bool [rows, tokens], True: a token of the text; None: nothing is padded. window: how far a token sees to each
    side. like: its dtype and device are the mask's.
    """
    sees = None if text is None else text[:, None, None, :]
    if window is not None and num_tokens > window + 1:
        index = torch.arange(num_tokens, device=like.device)
        near = ((index[:, None] - index[None, :]).abs() <= window)[None, None]
        sees = near if sees is None else sees & near
    if sees is None:
        return None
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill(~sees, float("-inf"))
    return pad(mask, (num_virtual_tokens, 0))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
