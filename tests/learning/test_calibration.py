"""Temperatures on logits that are made too sure, and weights of labels that are rare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.domain import ProblemType
from app.learning.calibration import fit_temperature
from app.learning.figures import figures_of
from app.learning.problems import IGNORED, class_weights, loss_of

SINGLE, MULTI, TOKEN = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL, ProblemType.TOKEN


def honest(problem_type: ProblemType, rows: int) -> tuple[Tensor, Tensor]:
    """Logits [rows, 4], and targets drawn with just the probabilities that they state."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, 4, generator=generator)
    if problem_type is MULTI:
        return logits, torch.bernoulli(torch.sigmoid(logits), generator=generator)
    return logits, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]


def figures(problem_type: ProblemType, logits: Tensor, targets: Tensor) -> dict[str, float]:
    scores = torch.sigmoid(logits) if problem_type is MULTI else torch.softmax(logits, -1)
    gold = targets.bool() if problem_type is MULTI else targets
    return figures_of(problem_type, gold.numpy(), scores.double().numpy())


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("factor", [4.0, 0.3])
def test_what_is_too_sure_or_too_shy_becomes_honest(problem_type: ProblemType, factor: float) -> None:
    logits, targets = honest(problem_type, 4000)
    shown, rest = factor * logits[:2000], factor * logits[2000:]
    temperature = fit_temperature(problem_type, shown, targets[:2000])
    assert temperature == pytest.approx(factor, rel=0.1)
    before = figures(problem_type, rest, targets[2000:])
    after = figures(problem_type, rest / temperature, targets[2000:])
    assert after["ece"] < 0.03 < 0.08 < before["ece"]
    assert after["accuracy"] == before["accuracy"]


def test_honest_logits_stay_as_they_are() -> None:
    assert fit_temperature(SINGLE, *honest(SINGLE, 4000)) == pytest.approx(1.0, abs=0.05)


def test_tokens_without_a_tag_do_not_count() -> None:
    logits, targets = honest(TOKEN, 1000)
    wrong = torch.cat((logits, 50 * torch.ones(500, 4)))
    tagged = torch.cat((targets, torch.full((500,), IGNORED)))
    assert fit_temperature(TOKEN, 3 * wrong, tagged) == pytest.approx(fit_temperature(TOKEN, 3 * logits, targets), 0.01)


def test_a_regression_has_no_temperature() -> None:
    assert fit_temperature(ProblemType.REGRESSION, torch.ones(3, 1), torch.ones(3)) == 1.0


def test_a_small_set_without_a_mistake_does_not_ask_for_certainty() -> None:
    targets = torch.arange(12) % 3
    assert 0.5 < fit_temperature(SINGLE, 3 * torch.eye(3)[targets], targets) <= 1.0


def test_a_set_that_is_all_wrong_stays_within_bounds() -> None:
    targets = torch.arange(3000) % 3
    assert fit_temperature(SINGLE, 500 * torch.eye(3)[(targets + 1) % 3], targets) == pytest.approx(20.0, rel=0.01)


# -- weights of labels -------------------------------------------------------------------------------------------------

UNEVEN = torch.tensor([0] * 90 + [1] * 10)


def test_labels_weigh_as_they_are_rare() -> None:
    weights = class_weights(SINGLE, UNEVEN, 3, 1.0)
    assert weights is not None
    assert weights[:2].tolist() == pytest.approx([100 / 90 / 2, 100 / 10 / 2])
    halfway = class_weights(SINGLE, UNEVEN, 3, 0.5)
    assert halfway is not None and float(halfway[1] / halfway[0]) == pytest.approx(3.0)
    assert float(halfway[UNEVEN].mean()) == pytest.approx(1.0)


def test_of_several_labels_what_is_given_weighs_against_what_is_not() -> None:
    given = torch.zeros(1000, 3)
    given[:1, 0], given[:200, 1] = 1, 1
    weights = class_weights(MULTI, given, 3, 1.0)
    assert weights is not None and weights.tolist() == pytest.approx([20.0, 4.0, 20.0])


@pytest.mark.parametrize(
    ("problem_type", "power"), [(SINGLE, 0.0), (MULTI, 0.0), (TOKEN, 1.0), (ProblemType.REGRESSION, 1.0)]
)
def test_nothing_to_weigh(problem_type: ProblemType, power: float) -> None:
    assert class_weights(problem_type, UNEVEN, 2, power) is None


def test_a_weighed_loss_makes_labels_equal() -> None:
    """Logits that know nothing: pulled towards the frequent label without weights, and nowhere with them."""
    for power, is_pulled in ((0.0, True), (1.0, False)):
        logits = torch.zeros(100, 2, requires_grad=True)
        torch.autograd.backward(loss_of(SINGLE, logits, UNEVEN, class_weights(SINGLE, UNEVEN, 2, power)))
        assert logits.grad is not None
        assert (abs(float(logits.grad[:, 0].sum())) > 0.1) is is_pulled


def test_weights_of_one_leave_the_loss_as_it_is() -> None:
    for problem_type in (SINGLE, MULTI):
        logits, targets = honest(problem_type, 50)
        plain, weighed = (loss_of(problem_type, logits, targets, weights) for weights in (None, torch.ones(4)))
        assert float(weighed) == pytest.approx(float(plain))
