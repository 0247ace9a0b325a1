"""The best sequence of tags, against one that tries them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.domain import Encoding
from app.engine import chain
from app.engine.chain import decode, likeliest
from tests.engine.models import best_of_all

LABELS = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[1], [6], [4, 1, 6, 2], [2, 0, 5]])
def test_it_finds_the_best_of_all_sequences(lengths: list[int]) -> None:
    scores, transitions = random(len(lengths), max(lengths), LABELS), random(LABELS + 1, LABELS, seed=1)
    found = likeliest(scores, lengths, transitions)
    for row, length in enumerate(lengths):
        if length:
            assert found[row, :length].tolist() == best_of_all(scores[row, :length], transitions).tolist()
            assert set(found[row, length:].tolist()) <= {int(found[row, length - 1])}


def test_many_rows_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, transitions, lengths = random(7, 5, LABELS), random(LABELS + 1, LABELS, seed=1), [5, 1, 0, 3, 4, 2, 5]
    together = likeliest(scores, lengths, transitions)
    monkeypatch.setattr(chain, "_MOST_STEPS", 2 * LABELS**2)
    assert torch.equal(likeliest(scores, lengths, transitions), together)


def test_only_first_tokens_of_words_are_in_the_chain() -> None:
    probabilities, transitions = random(3, 8, LABELS).softmax(-1), random(LABELS + 1, LABELS, seed=1)
    words = [[1, 2, 5], [], [1, 3, 4, 6]]
    tags = decode(probabilities, words, transitions)
    for row, places in enumerate(words):
        expected = probabilities[row].argmax(-1)
        if places:
            expected[places] = best_of_all(probabilities[row, places].log(), transitions)
        assert tags[row].tolist() == expected.tolist()
    assert not torch.equal(tags, probabilities.argmax(-1))  # else this would show nothing


def test_texts_without_words_keep_their_highest() -> None:
    probabilities = random(2, 4, LABELS).softmax(-1)
    assert torch.equal(decode(probabilities, [[], []], random(LABELS + 1, LABELS)), probabilities.argmax(-1))


def test_a_step_that_must_not_be_is_never_taken_even_against_certainty() -> None:
    """O, B, I, with I behind O forbidden: a head that is sure of O and then I gets B and I, or O and O."""
    transitions = torch.zeros(4, 3)
    transitions[0, 2] = transitions[3, 2] = -1e4
    sure = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    assert decode(sure, [[0, 1]], transitions).tolist() != [[0, 2]]
    leaning = torch.tensor([[[0.6, 0.4, 0.0], [0.1, 0.0, 0.9]]])
    assert decode(leaning, [[0, 1]], transitions).tolist() == [[1, 2]]


def test_the_first_tokens_of_an_encoding() -> None:
    words = (None, 0, 0, 1, 2, 2, 2, None)
    assert Encoding((0,) * 8, (0,) * 8, word_ids=words).first_tokens == [1, 3, 4]
    assert Encoding((0,) * 8, (0,) * 8).first_tokens == []
