"""Intervals cover what they promise, for few samples and shares near 0 and 1 too."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from statewright.intervals import Estimate, estimate, paired, spread, stratified, student

# Tables of Student's distribution, two-sided 95 %.
QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 10**6: 1.9600}


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def covers(found: Estimate, truth: float) -> bool:
    return found.interval is not None and found.interval[0] <= truth <= found.interval[1]


@pytest.mark.parametrize("freedom", QUANTILES)
def test_students_quantiles(freedom: int) -> None:
    assert student(freedom) == pytest.approx(QUANTILES[freedom], abs=5e-5)


@pytest.mark.parametrize("n", [4, 10, 20, 50])
def test_a_proportion_is_covered_exactly_counted(n: int) -> None:
    """Every outcome by its probability; a standard error covers almost nothing near 0 and 1."""
    found = [estimate([1.0] * k + [0.0] * (n - k), shares=True) for k in range(n + 1)]
    shares = np.linspace(0.005, 0.995, 199)
    coverage = [
        math.fsum(binomial(k, n, p) for k in range(n + 1) if covers(found[k], p)) for p in shares
    ]
    assert np.mean(coverage) >= 0.945 and min(coverage) >= 0.82
    assert all(e.low < e.mean or e.low == e.mean == 0 for e in found)
    assert all(e.mean < e.high or e.mean == e.high == 1 for e in found)
    assert all(0 <= e.low <= e.high <= 1 for e in found)
    for ours, other in zip(found, reversed(found)):
        assert ours.low == pytest.approx(1 - other.high)


def test_wilsons_own_numbers() -> None:
    """Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29."""
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = estimate([1] * k + [0] * (n - k), shares=True)
        assert found.interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [4, 10, 20])
def test_a_paired_difference_is_covered_exactly_counted(n: int) -> None:
    outcomes = [(a, b) for a, b in product(range(n + 1), repeat=2) if a + b <= n]
    found = {
        (a, b): paired([1] * a + [0] * (n - a), [0] * a + [1] * b + [0] * (n - a - b), shares=True)
        for a, b in outcomes
    }
    coverage = []
    for better, worse in product((0.01, 0.05, 0.2, 0.4, 0.55), repeat=2):
        if better + worse > 1:
            continue
        same = 1 - better - worse
        coverage.append(
            math.fsum(
                math.comb(n, a) * math.comb(n - a, b) * better**a * worse**b * same ** (n - a - b)
                for a, b in outcomes
                if covers(found[a, b], better - worse)
            )
        )
    assert np.mean(coverage) >= 0.95 and min(coverage) >= 0.9


def test_all_lost_of_four_is_no_certainty() -> None:
    found = paired([0.0] * 4, [1.0] * 4, shares=True)
    assert found.mean == found.low == -1 and -0.2 < found.high < 0
    assert estimate([1.0] * 4, shares=True).interval == pytest.approx((0.5101, 1), abs=1e-4)
    same = paired([1.0] * 4, [1.0] * 4, shares=True)
    assert same.low == -same.high < -0.2
    halves = estimate([0.5] * 4, shares=True)
    assert 0.2 < halves.low < 0.5 < halves.high < 0.8


@pytest.mark.parametrize("n", [2, 4, 10])
def test_a_mean_is_covered(n: int) -> None:
    draws = np.random.default_rng(n).normal(3, 2, (2000, n)).tolist()
    found = [estimate(row) for row in draws]
    assert np.mean([covers(e, 3) for e in found]) == pytest.approx(0.95, abs=0.015)
    assert found[0].mean == pytest.approx(np.mean(draws[0])) and found[0].n == n


@pytest.mark.parametrize("sizes", [(2, 4), (2, 4, 8, 16), (1, 3, 30)])
def test_strata_are_covered(sizes: tuple[int, ...]) -> None:
    """Each stratum has a mean and a spread of its own; the estimate is the mean of the means."""
    generator, means = np.random.default_rng(0), np.arange(len(sizes))
    spreads = [0.0 if size == 1 else 1.0 + 2 * i for i, size in enumerate(sizes)]
    hits = []
    for _ in range(1500):
        strata = [generator.normal(m, s, k).tolist() for m, s, k in zip(means, spreads, sizes)]
        hits.append(covers(stratified(strata), float(means.mean())))
    # Welch and Satterthwaite are about two points short for the smallest strata.
    assert np.mean(hits) >= 0.92


def test_what_the_values_cannot_say() -> None:
    assert estimate([2.0]) == Estimate(2.0, None, None, 1) and spread([2.0]) is None
    assert estimate([2.0] * 3).interval is None and paired([1, 2], [1, 2]).interval is None
    assert estimate([1.0, math.nan]).interval is None
    assert math.isnan(stratified([[math.nan, 1.0]]).mean)
    assert stratified([[math.nan, 1.0]]).interval is None
    assert stratified([[0.0, 0.0]]).interval is None
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    for wrong in (lambda: estimate([]), lambda: paired([1.0], []), lambda: stratified([[]])):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()
    with pytest.raises(ValueError, match="values beyond 0 and 1"):
        estimate([0.5, 1.5], shares=True)
