"""What differs between problem types in training: targets, loss, thresholds and the figure that picks the best epoch.

Knows labels and logits; nothing of states or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from app.domain import Encoding, ProblemType
from app.learning.alignment import token_tags, word_starts
from app.learning.data import Example, Table
from app.learning.figures import f1_by_threshold, figures_of_tags, macro_f1, pearson

IGNORED = -100  # torch's own index for tokens without a tag
# what the dev score of an epoch is, and what figures are called after
MEASURES = {
    ProblemType.SINGLE_LABEL: "accuracy",
    ProblemType.MULTI_LABEL: "macro_f1",
    ProblemType.REGRESSION: "pearson",
    ProblemType.TOKEN: "f1",
}


@dataclass(frozen=True, slots=True)
class Scaling:
    """Regression is learned on standardised scores."""

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, table: Table) -> Scaling:
        scores = torch.tensor([example.score for example in table.examples], dtype=torch.float64)
        return cls(float(scores.mean()), float(scores.std()) or 1.0)


def num_outputs(problem_type: ProblemType, labels: Sequence[str]) -> int:
    return 1 if problem_type is ProblemType.REGRESSION else len(labels)


def targets_of(table: Table, labels: Sequence[str], encodings: Sequence[Encoding], scaling: Scaling) -> Tensor:
    """Single-label: int [texts]; multi-label: float [texts, labels]; regression: float [texts];
    tokens: int [tokens of all texts], IGNORED where a token carries no tag."""
    index = {label: i for i, label in enumerate(labels)}
    examples = table.examples
    match table.problem_type:
        case ProblemType.SINGLE_LABEL:
            return torch.tensor([index[example.labels[0]] for example in examples])
        case ProblemType.MULTI_LABEL:
            given = torch.zeros(len(examples), len(labels))
            for row, example in enumerate(examples):
                given[row, [index[label] for label in example.labels]] = 1.0
            return given
        case ProblemType.REGRESSION:
            scores = torch.tensor([example.score for example in examples])
            return (scores - scaling.mean) / scaling.std
        case _:
            pieces = [_tag_ids(e, c, index) for e, c in zip(examples, encodings, strict=True)]
            return torch.cat(pieces)


def _tag_ids(example: Example, encoding: Encoding, index: dict[str, int]) -> Tensor:
    ids = torch.full((len(encoding),), IGNORED)
    for token, tag in token_tags(word_starts(encoding, example.words), example.labels):
        ids[token] = index[tag]
    return ids


def loss_of(problem_type: ProblemType, logits: Tensor, targets: Tensor) -> Tensor:
    match problem_type:
        case ProblemType.MULTI_LABEL:
            return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()
        case ProblemType.REGRESSION:
            return functional.mse_loss(logits.squeeze(-1), targets)
        case _:
            return functional.cross_entropy(logits, targets)


def dev_figure(
    problem_type: ProblemType, logits: Tensor, targets: Tensor, labels: Sequence[str], lengths: Sequence[int]
) -> float:
    """The measure of MEASURES. For tokens `logits` and `targets` hold tagged tokens alone, `lengths` a text each."""
    match problem_type:
        case ProblemType.SINGLE_LABEL:
            return float((logits.argmax(-1) == targets).double().mean())
        case ProblemType.MULTI_LABEL:
            probabilities, given = torch.sigmoid(logits).numpy(), targets.numpy() > 0.5
            _, chosen = f1_by_threshold(probabilities, given)
            return macro_f1(probabilities >= chosen, given)
        case ProblemType.REGRESSION:
            return pearson(logits.squeeze(-1).tolist(), targets.tolist())
        case _:
            found, gold = ([labels[i] for i in ids.tolist()] for ids in (logits.argmax(-1), targets))
            return figures_of_tags(_split(gold, lengths), _split(found, lengths))["f1"]


def _split(items: Sequence[str], lengths: Sequence[int]) -> list[list[str]]:
    pieces, start = [], 0
    for length in lengths:
        pieces.append(list(items[start : start + length]))
        start += length
    return pieces
