"""Two samples side by side: the index and the p-value are those of the books, and chance alone is no drift."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2_contingency

from app.service.homogeneity import any_share_moved, by_frequency, compare

LIVE, BASELINE = [30, 50, 20, 100], [120, 100, 130, 250]


def row(counts: list[int]) -> NDArray[np.int64]:
    return np.array([counts], np.int64)


def both(live: list[int], baseline: list[int]) -> tuple[float, float]:
    psi, p_value = compare(row(live), row(baseline))
    return float(psi[0]), float(p_value[0])


def test_the_p_value_is_that_of_the_chi_square_test() -> None:
    _, p_value = both(LIVE, BASELINE)
    assert p_value == pytest.approx(chi2_contingency([LIVE, BASELINE], correction=False).pvalue, rel=1e-9)


def test_the_index_is_that_of_the_shares_less_what_chance_shows() -> None:
    psi, _ = both([10 * count for count in LIVE], [10 * count for count in BASELINE])
    p, q = (np.array(counts) / sum(counts) for counts in (LIVE, BASELINE))
    known = float(((p - q) * np.log(p / q)).sum()) - 3 * (1 / 2000 + 1 / 6000)
    assert psi == pytest.approx(known, rel=0.01)  # each bin has half a text more


def test_both_sides_are_samples() -> None:
    assert both(LIVE, BASELINE) == pytest.approx(both(BASELINE, LIVE))
    _, with_few = both([600, 400], [30, 30])
    _, with_many = both([600, 400], [3000, 3000])
    assert with_many < 1e-6 < 0.05 < with_few


def test_rare_bins_are_one() -> None:
    """Each alone says nothing; a bin that is empty by chance must not rule the index."""
    live, baseline = [1, 0, 1, 0, 1, 0, 997], [0, 1, 0, 1, 0, 1, 997]
    assert both(live, baseline) == (0.0, 1.0)


def test_a_bin_that_was_empty_before_counts_once_many_are_in_it() -> None:
    psi, p_value = both([500, 500], [1000, 0])
    assert psi > 1 and p_value < 1e-9


@pytest.mark.parametrize(("live", "baseline"), [([0, 0], [5, 5]), ([5, 5], [0, 0]), ([0, 0], [0, 0]), ([9], [9])])
def test_of_nothing_nothing_is_said(live: list[int], baseline: list[int]) -> None:
    assert both(live, baseline) == (0.0, 1.0)


def test_rows_stand_for_themselves() -> None:
    psi, p_value = compare(np.array([LIVE, [1, 2, 3, 4]]), np.array([BASELINE, [400, 300, 200, 100]]))
    assert (psi[0], p_value[0]) == pytest.approx(both(LIVE, BASELINE))
    assert (psi[1], p_value[1]) == pytest.approx(both([1, 2, 3, 4], [400, 300, 200, 100]))


def test_of_labels_the_rare_are_neighbours() -> None:
    live, baseline = by_frequency(np.array([1, 90, 0, 9]), np.array([0, 900, 2, 98]))
    assert live.tolist() == [90, 9, 0, 1] and baseline.tolist() == [900, 98, 2, 0]


@pytest.mark.parametrize("bins", [2, 10, 150])
def test_the_p_value_of_noise_is_evenly_spread_and_its_index_small(bins: int) -> None:
    random = np.random.default_rng(bins)
    shares = random.dirichlet(np.ones(bins))
    psi, p_value = compare(random.multinomial(500, shares, 2000), random.multinomial(800, shares, 2000))
    assert np.mean(p_value < 0.01) < 0.02 and 0.45 < np.mean(p_value) < 0.55 + 0.05 * (bins == 2)
    assert np.mean(psi > 0.1) < 0.02 and np.max(psi) < 0.25


# -- what a text may have several of -----------------------------------------------------------------------------------


def moved(live: list[int], texts: int, baseline: list[int], baseline_texts: int) -> float:
    return any_share_moved(np.array(live), texts, np.array(baseline), baseline_texts)


def test_one_property_is_a_binomial_test_and_the_smallest_of_several_counts_so_often() -> None:
    alone = moved([30], 500, [20], 1000)
    assert alone == pytest.approx(2 * binomtest(30, 50, 1 / 3, alternative="greater").pvalue)
    assert moved([30, 50], 500, [20, 100], 1000) == pytest.approx(2 * alone)
    assert moved([30, 1, 499], 500, [20, 2, 999], 1000) == alone  # too rare, or too rarely missing, to say anything


def test_what_most_texts_have_is_looked_at_from_the_other_side() -> None:
    assert moved([470], 500, [980], 1000) == pytest.approx(moved([30], 500, [20], 1000))


@pytest.mark.parametrize("counts", [([0], 0, [5], 9), ([5], 9, [0], 0), ([2], 500, [1], 500), ([9], 9, [99], 9)])
def test_of_too_little_no_property_says_anything(counts: tuple[list[int], int, list[int], int]) -> None:
    assert moved(*counts) == 1.0


@pytest.mark.parametrize(("texts", "baseline_texts"), [(200, 1000), (500, 800), (2000, 800)])
def test_properties_that_come_in_threes_alarm_no_more_often_than_they_may(texts: int, baseline_texts: int) -> None:
    random, shares = np.random.default_rng(texts), np.geomspace(0.02, 0.3, 9)
    live, baseline = (np.repeat(random.binomial(n, shares, (3000, 9)), 3, 1) for n in (texts, baseline_texts))
    found = [any_share_moved(a, texts, b, baseline_texts) for a, b in zip(live, baseline, strict=True)]
    assert np.mean(np.array(found) < 0.01) < 0.005
    assert moved([3 * texts // 10] + [texts // 10] * 27, texts, [baseline_texts // 10] * 28, baseline_texts) < 0.01
