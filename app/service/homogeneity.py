"""How far two samples of counts are apart, and whether chance alone explains it. Knows bins; not what they count.

Bins that are too rare for either are merged with their neighbours first: a statistic of expected counts below five
follows no chi-square distribution, and a bin that happens to be empty would rule the index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, chdtrc

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
_LEAST_EXPECTED = 5.0
_SMOOTHING = 0.5  # of a text in each bin: an empty one is rare, not impossible


def compare(live: Counts, baseline: Counts) -> tuple[Floats, Floats]:
    """Rows [rows, bins] of counts side by side: the population stability index and the p-value of each, [rows].

    The index, sum of (p - q) ln(p / q), is less what two samples of these sizes from one population show on average,
    (bins - 1)(1 / n + 1 / m), and 0 at least: without that, few texts in many bins look like drift.
    The p-value is of Pearson's chi-square test of homogeneity: the baseline is a sample too.
    """
    live, baseline = _merged(live, baseline)
    used = (live + baseline) > 0
    bins = used.sum(axis=1)
    n, m = live.sum(axis=1, keepdims=True), baseline.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # of empty samples, of which nothing is said below
        p, q = (_shares(counts, total, used, bins) for counts, total in ((live, n), (baseline, m)))
        psi = np.where(used, (p - q) * np.log(p / q), 0.0).sum(axis=1)
        by_chance = (bins - 1) * (1 / n + 1 / m)[:, 0]
        difference = live * np.sqrt(m / n) - baseline * np.sqrt(n / m)
        statistic = np.where(used, difference**2 / (live + baseline), 0.0).sum(axis=1)
    can_tell = (bins > 1) & (n[:, 0] > 0) & (m[:, 0] > 0)
    p_value = chdtrc(np.maximum(bins - 1, 1), np.where(can_tell, statistic, 0.0))
    return np.where(can_tell, np.maximum(psi - by_chance, 0.0), 0.0), np.where(can_tell, p_value, 1.0)


def any_share_moved(live: Counts, texts: int, baseline: Counts, baseline_texts: int) -> float:
    """The p-value of texts that each have any of some properties: [properties] texts that have each, of so many.

    Properties that come together are no independent texts, so each stands alone beside those that lack it, and the
    smallest p-value counts, times the number of them (Bonferroni); those that five texts are not expected to have, and
    to lack, say nothing. Of those that have it (or lack it, where they are fewer) the live ones are binomial: exact for
    the rare, where the chi-square distribution is too sure, and cautious for the common.
    """
    total = texts + baseline_texts
    if not texts or not baseline_texts:
        return 1.0
    is_common = 2 * (live + baseline) > total
    some = np.where(is_common, texts - live, live)
    both = np.where(is_common, total - live - baseline, live + baseline)
    both = np.maximum(both, some)  # whatever a manifest says
    tested = both * (min(texts, baseline_texts) / total) >= _LEAST_EXPECTED
    if not tested.any():
        return 1.0
    some, both = some[tested], both[tested]
    share = texts / total
    fewer, more = bdtr(some, both, share), np.where(some > 0, bdtrc(np.maximum(some - 1, 0), both, share), 1.0)
    return float(min(1.0, 2 * np.minimum(fewer, more).min() * len(some)))


def by_frequency(live: Counts, baseline: Counts) -> tuple[Counts, Counts]:
    """The bins of one row [bins] each, most frequent first: of what has no order, the rare are neighbours then."""
    order = np.argsort(-(live + baseline), kind="stable")
    return live[order], baseline[order]


def _shares(counts: Counts, total: Counts, used: NDArray[np.bool_], bins: NDArray[Any]) -> Floats:
    shares: Floats = (counts + _SMOOTHING) / (total + _SMOOTHING * bins[:, None])
    return np.where(used, shares, 1.0)


def _merged(live: Counts, baseline: Counts) -> tuple[Counts, Counts]:
    """Neighbours in one bin until five texts of the smaller sample are expected there; the rest goes to the last."""
    n, m = live.sum(axis=1), baseline.sum(axis=1)
    together = live + baseline
    with np.errstate(divide="ignore", invalid="ignore"):
        smaller = np.nan_to_num(np.minimum(n, m) / (n + m))
    expected = together * smaller[:, None]
    rows, bins = live.shape
    group = np.zeros((rows, bins), np.int64)
    number, sofar = np.zeros(rows, np.int64), np.zeros(rows)
    for column in range(bins):
        group[:, column] = number
        sofar += expected[:, column]
        is_full = sofar >= _LEAST_EXPECTED
        number += is_full
        sofar[is_full] = 0.0
    group = np.minimum(group, np.maximum(number - 1, 0)[:, None])
    flat = (group + np.arange(rows)[:, None] * bins).ravel()
    summed = [
        np.bincount(flat, weights=counts.ravel(), minlength=rows * bins).astype(np.int64).reshape(rows, bins)
        for counts in (live, baseline)
    ]
    return summed[0], summed[1]
