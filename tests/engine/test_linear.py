"""Layers of one shape lie side by side, are computed together, and a slot is never written while it is in use."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.domain import ProblemType
from app.engine.heads import ResidentHead, score_all
from app.engine.linear import Linear, LinearBank, apply_all

CPU = torch.device("cpu")


def _tensors(seed: int, out_size: int = 3, in_size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_size, in_size, generator=generator), torch.randn(out_size, generator=generator)


@pytest.mark.parametrize("chosen", [range(40), [7], [3, 4, 5, 20, 9], [39, 38, 0], [10, 10]])
def test_layers_together_equal_each_alone(chosen: list[int]) -> None:
    bank = LinearBank(CPU)
    layers = [bank.place(*_tensors(seed)) for seed in range(40)]
    features = torch.randn(len(chosen), 6, 5)
    expected = [functional.linear(row, *_tensors(i)) for i, row in zip(chosen, features, strict=True)]
    torch.testing.assert_close(apply_all([layers[i] for i in chosen], features), torch.stack(expected))


def test_layers_placed_one_after_another_are_neighbours_and_little_room_is_idle() -> None:
    bank = LinearBank(CPU)
    layers = [bank.place(*_tensors(seed)) for seed in range(100)]
    slabs = {layer.slab.serial: layer.slab for layer in layers}
    assert len(slabs) <= 14
    assert sum(len(slab.tenants) for slab in slabs.values()) <= 100 + 16
    assert [layer.place for layer in layers] == sorted(layer.place for layer in layers)


def test_a_slot_is_free_again_only_when_nobody_holds_its_layer() -> None:
    bank = LinearBank(CPU)
    layers = [bank.place(*_tensors(seed)) for seed in range(20)]
    held, place = layers[16], layers[15].place
    assert held.slab is layers[15].slab
    before = held(torch.ones(5)).clone()
    del layers[15]
    gc.collect()
    assert bank.place(*_tensors(9)).place == place
    newer = [bank.place(*_tensors(seed)) for seed in range(20, 60)]
    assert held.place not in [layer.place for layer in newer]
    torch.testing.assert_close(held(torch.ones(5)), before)


def test_layers_placed_together_are_neighbours_wherever_there_is_room() -> None:
    bank = LinearBank(CPU)
    layers = [bank.place(*_tensors(seed)) for seed in range(30)]
    del layers[3::2]  # single slots are free everywhere
    gc.collect()
    weights, biases = zip(*(_tensors(seed) for seed in range(40, 44)), strict=True)
    for _ in range(2):
        together = bank.place_all(weights, biases)
        layers += together
        first = together[0]
        assert [layer.place for layer in together] == [(first.slab.serial, first.slot + i) for i in range(4)]
        for layer, weight, bias in zip(together, weights, biases, strict=True):
            torch.testing.assert_close(layer(torch.ones(5)), functional.linear(torch.ones(5), weight, bias))


def test_memory_goes_with_the_last_layer_of_a_slab() -> None:
    bank = LinearBank(CPU)
    layer = bank.place(*_tensors(0))
    weights = weakref.ref(layer.slab.weights)
    del layer
    gc.collect()
    assert weights() is None


def _head(bank: LinearBank, seed: int, hidden: int | None, labels: int, kind: ProblemType) -> ResidentHead:
    dense: tuple[Linear, ...] = () if hidden is None else (bank.place(*_tensors(seed, hidden, 8)),)
    out = bank.place(*_tensors(100 + seed, labels, hidden or 8))
    return ResidentHead(None, dense, "gelu" if seed % 2 else "relu", out, kind)


def test_heads_of_many_shapes_together_equal_each_alone() -> None:
    bank = LinearBank(CPU)
    kinds = [ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL, ProblemType.REGRESSION]
    heads = [
        _head(bank, seed, (None, 4, 6)[seed % 3], (2, 3)[seed % 2], kinds[seed % len(kinds)]) for seed in range(24)
    ]
    heads.append(ResidentHead(None, (), "", None, ProblemType.EMBEDDING))
    heads.sort(key=lambda head: head.order)
    features = torch.randn(len(heads), 7, 8)
    parts = list(score_all(heads, features))
    together = [row for size, scores in parts for row in scores]
    assert sum(size for size, _ in parts) == len(heads) > len(parts)
    for head, row, scores in zip(heads, features, together, strict=True):
        torch.testing.assert_close(scores, head.scores(row), rtol=0, atol=1e-6)
