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
from app.learning.chain import decode_tags, span_f1
from app.learning.data import Example, Table
from app.learning.figures import (
    f1_by_threshold,
    figures_of_classes,
    figures_of_sets,
    figures_of_values,
    macro_f1,
    pearson,
)

IGNORED = -100  # torch's own index for tokens without a tag
_MAX_WEIGHT = 20.0  # of a label in a multi-label loss
# what the dev score of an epoch may be, the usual one first
CHOICES = {
    ProblemType.SINGLE_LABEL: ("accuracy", "macro_f1", "mcc"),
    ProblemType.MULTI_LABEL: ("macro_f1", "micro_f1"),
    ProblemType.REGRESSION: ("pearson", "spearman"),
    ProblemType.TOKEN: ("f1",),
}
MEASURES = {problem_type: names[0] for problem_type, names in CHOICES.items()}


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


def tagged(targets: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The tag ids of each text's tagged tokens. targets [tokens of all texts]; `lengths`: tokens of each."""
    return [tags[tags != IGNORED] for tags in torch.split(targets, list(lengths))]


def class_weights(problem_type: ProblemType, targets: Tensor, num_outputs: int, power: float) -> Tensor | None:
    """Weights [labels] for `loss_of` that let rare labels count more: 0 leaves all alike, 1 makes labels equal.

    Single-label: of an example by its label, 1 on average. Multi-label: of where a label is given against where it is
    not. None where there is nothing to weigh.
    """
    if not power:
        return None
    match problem_type:
        case ProblemType.SINGLE_LABEL:
            counts = torch.bincount(targets, minlength=num_outputs).clamp(min=1)
            weights = (len(targets) / counts) ** power
            return weights / weights[targets].mean()
        case ProblemType.MULTI_LABEL:
            given = targets.sum(0)
            ratio = (len(targets) - given) / given.clamp(min=1)
            return (ratio**power).clamp(1 / _MAX_WEIGHT, _MAX_WEIGHT)
        case _:
            return None


def loss_of(problem_type: ProblemType, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """`weights`: from `class_weights`. Logits may be [members, rows, labels]: then it is the mean over members."""
    if logits.dim() == 3:
        targets = targets.repeat(len(logits), *[1] * (targets.dim() - 1))
        logits = logits.flatten(0, 1)
    match problem_type:
        case ProblemType.MULTI_LABEL:
            each = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
            return each.sum(-1).mean()
        case ProblemType.REGRESSION:
            return functional.mse_loss(logits.squeeze(-1), targets)
        case _ if weights is None:
            return functional.cross_entropy(logits, targets)
        case _:  # weighed by example: torch's own mean would undo the weights of a batch with one label
            return (functional.cross_entropy(logits, targets, reduction="none") * weights[targets]).mean()


def dev_figure(
    problem_type: ProblemType,
    logits: Tensor,
    targets: Tensor,
    labels: Sequence[str],
    lengths: Sequence[int],
    transitions: Tensor | None = None,
    measure: str = "",
) -> float:
    """`measure`: of CHOICES; "": of MEASURES. Where it is undefined, 0.

    For tokens `logits` and `targets` hold tagged tokens alone, `lengths` a text each, and `transitions`
    [labels + 1, labels] score how tags follow one another.
    """
    is_usual = measure in ("", MEASURES[problem_type])
    match problem_type:
        case ProblemType.SINGLE_LABEL:
            found = logits.argmax(-1)
            if is_usual:
                return float((found == targets).double().mean())
            return figures_of_classes(targets.tolist(), found.tolist(), len(labels)).get(measure, 0.0)
        case ProblemType.MULTI_LABEL:
            probabilities, given = torch.sigmoid(logits).numpy(), targets.numpy() > 0.5
            chosen = probabilities >= f1_by_threshold(probabilities, given)[1]
            return macro_f1(chosen, given) if is_usual else figures_of_sets(given, chosen)[measure]
        case ProblemType.REGRESSION:
            values, gold = logits.squeeze(-1).tolist(), targets.tolist()
            return pearson(values, gold) if is_usual else figures_of_values(gold, values)[measure]
        case _:
            found = logits.argmax(-1) if transitions is None else decode_tags(logits, lengths, transitions)
            return span_f1(found, targets, lengths, labels)
