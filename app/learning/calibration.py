"""How sure a task may be: one temperature that makes its probabilities honest. Knows logits and targets.

Temperature scaling: Guo et al. 2017 (arXiv 1706.04599), section 4.2. Dividing the last layer's weight and bias by it
does the same, so nothing that serves a task needs to know of it.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from app.domain import ProblemType
from app.learning.problems import loss_of

_LOWEST, _HIGHEST = 0.05, 20.0


@torch.no_grad()
def fit_temperature(problem_type: ProblemType, logits: Tensor, targets: Tensor) -> float:
    """The temperature with the least loss on logits [rows, labels] that were not trained on; 1 for a regression, and
    where none is better. For tokens: those with a tag alone.

    A weak normal prior on its logarithm holds it near 1 where rows are few: a small set without a mistake would
    otherwise ask for a certainty that it cannot vouch for.
    """
    if problem_type is ProblemType.REGRESSION or not len(logits):
        return 1.0
    exact = logits.double()
    answers = targets.double() if problem_type is ProblemType.MULTI_LABEL else targets

    def loss(log_temperature: float) -> float:
        likelihood = float(loss_of(problem_type, exact / math.exp(log_temperature), answers))
        return likelihood + log_temperature**2 / (2 * len(exact))

    bounds = math.log(_LOWEST), math.log(_HIGHEST)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0
