"""How tags follow one another in the training rows, as an artifact's transitions. Knows tags; nothing of states.

A step from tag to tag scores how much more often it comes than its second tag does anyway (pointwise mutual
information), times a weight that the dev rows choose: 0 leaves only what BIO forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.chain import likeliest
from app.learning.figures import figures_of_tags

USUAL_WEIGHT = 0.5  # where none is chosen yet
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PRIOR = 5.0  # steps from each tag that are taken to have come as any tag does
_FORBIDDEN = -1e4  # also in half precision
_SLIPS = 0.05  # share of a kind's spans that may begin with I by mistake
_ROWS = 256  # decoded together


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """What is known of a task's tags."""

    labels: Sequence[str]
    steps: Tensor  # [labels + 1, labels]: how often each came; the last row: at the beginning

    @classmethod
    def of(cls, texts: Sequence[Tensor], labels: Sequence[str]) -> Chain:
        """`texts`: the tag ids of each."""
        count = len(labels)
        befores = [torch.cat((torch.tensor([count]), tags))[: len(tags)] for tags in texts]
        places = torch.cat(befores) * count + torch.cat(list(texts))
        return cls(labels, torch.bincount(places, minlength=(count + 1) * count).view(count + 1, count).double())

    def transitions(self, weight: float = USUAL_WEIGHT) -> Tensor:
        """[labels + 1, labels]"""
        often = self.steps.sum(0) + 0.5
        usual = often / often.sum()
        likely = (self.steps + _PRIOR * usual) / (self.steps.sum(1, keepdim=True) + _PRIOR)
        found = weight * (likely / usual).log()
        return found.masked_fill(self._forbidden(), _FORBIDDEN).float()

    def tuned(self, logits: Tensor, gold: Sequence[Tensor]) -> Tensor:
        """The transitions with the best F1 of spans. logits [tagged tokens, labels]; `gold`: tag ids of each text."""
        lengths, wanted = list(map(len, gold)), torch.cat(list(gold))

        def f1(transitions: Tensor) -> float:
            return span_f1(decode_tags(logits, lengths, transitions), wanted, lengths, self.labels)

        return max(map(self.transitions, _WEIGHTS), key=f1)

    def _forbidden(self) -> Tensor:
        """bool [labels + 1, labels]: steps into the inside of a span that is not open, but where that is how the rows
        begin spans (some data sets do), and no slip."""
        kinds = [tag.partition("-")[2] for tag in self.labels]
        is_inside = torch.tensor([tag.startswith("I-") for tag in self.labels])
        breaks = torch.tensor([[before != kind for kind in kinds] for before in (*kinds, "")]) & is_inside
        begun = torch.where(breaks | ~is_inside, self.steps, 0.0).sum(0)  # spans that begin so, by B or by I
        spans = torch.tensor([sum(begun[i] for i, other in enumerate(kinds) if other == kind) for kind in kinds])
        return breaks & ~(is_inside & (begun > _SLIPS * spans))


def decode_tags(logits: Tensor, lengths: Sequence[int], transitions: Tensor) -> Tensor:
    """Tag ids [tagged tokens] of logits [tagged tokens, labels], text by text; `lengths`: tagged tokens of each."""
    rows = torch.split(logits.log_softmax(-1), list(lengths))
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i])
    found = [torch.empty(0, dtype=torch.long)] * len(rows)
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        sizes = [lengths[i] for i in chosen]
        padded = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True)
        for i, tags, size in zip(chosen, likeliest(padded, sizes, transitions), sizes, strict=True):
            found[i] = tags[:size]
    return torch.cat(found)


def span_f1(found: Tensor, gold: Tensor, lengths: Sequence[int], labels: Sequence[str]) -> float:
    """Of tag ids [tagged tokens]; `lengths`: tagged tokens of each text."""
    named = ([[labels[i] for i in tags.tolist()] for tags in torch.split(ids, list(lengths))] for ids in (gold, found))
    return figures_of_tags(*named)["f1"]
