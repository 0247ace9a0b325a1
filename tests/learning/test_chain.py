"""How tags follow one another, learned from rows that are made here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.learning.chain import Chain, decode_tags, span_f1

LABELS = ("O", "B-city", "I-city", "B-name", "I-name")
O, B, I, B2, I2 = range(5)  # noqa: E741  # as they are called


def texts(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.long) for row in rows]


def test_steps_are_counted_from_the_beginning_of_each_text() -> None:
    chain = Chain.of(texts([O, B, I], [], [B]), LABELS)
    assert chain.steps.sum() == 4
    assert chain.steps[5].tolist() == [1, 1, 0, 0, 0]
    assert chain.steps[O, B] == chain.steps[B, I] == 1


def test_what_comes_often_scores_high_and_what_bio_forbids_never_comes() -> None:
    transitions = Chain.of(texts(*[[O, B, I, O], [O, O, B2, O]] * 20), LABELS).transitions(1.0)
    assert transitions[B, I] > 1 > 0 > transitions[B, O]  # a city has two words
    for tag in (O, B2, I2, 5):
        assert transitions[tag, I] <= -1e4
    assert transitions[I, I] > -1e4 and transitions[B, B2] > -1e4  # never came, and may
    assert transitions.half().isfinite().all()


def test_where_the_rows_begin_spans_with_i_so_may_it() -> None:
    """Data sets in IOB1 do."""
    transitions = Chain.of(texts([O, I, I], [I, O]), LABELS).transitions()
    assert transitions[O, I] > -1e4 and transitions[5, I] > -1e4
    assert transitions[O, I2] <= -1e4


def test_a_slip_in_one_row_allows_nothing() -> None:
    clean = [[O, B, I, O]] * 50
    assert Chain.of(texts(*clean, [O, I, O]), LABELS).transitions()[O, I] <= -1e4
    assert Chain.of(texts(*clean, *[[O, I, O]] * 5), LABELS).transitions()[O, I] > -1e4


def test_a_weight_of_nothing_leaves_what_is_forbidden() -> None:
    transitions = Chain.of(texts([O, B, I]), LABELS).transitions(0.0)
    assert set(transitions.unique().tolist()) == {-1e4, 0.0}


def test_dev_chooses_the_weight() -> None:
    """Cities are always two words here: a head that misses half of the second ones is mended by what it has learned."""
    gold = texts(*[[O, B, I, O]] * 30)
    chain = Chain.of(gold, LABELS)
    logits = 4 * torch.nn.functional.one_hot(torch.cat(gold), 5).float()
    logits[2::8] = torch.tensor([2.0, 0, 1.6, 0, 0])
    lengths, wanted = [4] * 30, torch.cat(gold)
    plain = span_f1(logits.argmax(-1), wanted, lengths, LABELS)
    bare = span_f1(decode_tags(logits, lengths, chain.transitions(0.0)), wanted, lengths, LABELS)
    tuned = chain.tuned(logits, gold)
    assert plain == bare < 0.6
    assert span_f1(decode_tags(logits, lengths, tuned), wanted, lengths, LABELS) == 1.0


@pytest.mark.parametrize("lengths", [[3, 0, 2, 1], [0, 0], [6]])
def test_texts_are_decoded_in_their_order(lengths: list[int]) -> None:
    logits = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(0))
    transitions = Chain.of(texts([O, B, I, O, B2]), LABELS).transitions()
    together = decode_tags(logits, lengths, transitions)
    parts = [decode_tags(part, [len(part)], transitions) for part in torch.split(logits, lengths)]
    assert together.tolist() == torch.cat(parts).tolist()
