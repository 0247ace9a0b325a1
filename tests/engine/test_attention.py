"""Prefixes beside texts: the copies that a CUDA device makes in wide steps, on the CPU."""

from __future__ import annotations

import pytest
import torch

from app.engine.attention import cat_wide, is_wide, may_go_wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_steps_copy_the_same_numbers(dtype: torch.dtype) -> None:
    qkv = torch.randn(4, 9, 3 * 2 * 64).to(dtype).view(4, 9, 3, 2, 64).permute(2, 0, 3, 1, 4)
    prefix = torch.randn(2, 5, 64).to(dtype).expand(4, -1, -1, -1)  # one for all rows
    for text in qkv.unbind():
        assert is_wide(prefix) and is_wide(text)
        assert torch.equal(cat_wide((prefix, text), 2), torch.cat((prefix, text), dim=2))


def test_what_does_not_lie_in_whole_steps_is_not_wide() -> None:
    assert not is_wide(torch.randn(2, 3, 5).bfloat16())
    assert not is_wide(torch.randn(2, 64, 8).transpose(1, 2))
    assert not is_wide(torch.randn(2, 65)[:, 1:])


def test_wide_steps_lose_gradients_and_are_not_taken_where_there_are_any() -> None:
    """What is learned was silently not, from batches of more than 20 tokens on a CUDA device."""
    text, prefix = torch.randn(32, 12, 30, 32), torch.randn(32, 12, 16, 32, requires_grad=True)
    assert not cat_wide((prefix, text), 2).requires_grad
    assert may_go_wide((text, text)) and not may_go_wide((text, text[:2])) and not may_go_wide((prefix, text))
    with torch.no_grad():
        assert may_go_wide((prefix, text))
