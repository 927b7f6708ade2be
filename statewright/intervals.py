"""Where a mean lies, by its samples: intervals that hold for few samples too.

| values                                      | interval                                          |
|---------------------------------------------|---------------------------------------------------|
| 0 or 1                                      | Wilson's score interval (1927)                    |
| differences of such; a loss, a tie or a win | Bonett and Price (2012): one more of either end   |
| anything else, if its values differ         | Student's t, n - 1 degrees of freedom             |
| means of strata (octaves of a text)         | t, degrees of freedom by Welch and Satterthwaite  |

A standard error is 0 where all samples agree, which few samples do easily; the first two are not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
# Metrics that lie between 0 and 1, sample by sample.
SHARES = frozenset({"accuracy", "f1", "win_rate"})


@dataclass(frozen=True)
class Estimate:
    """The mean of n values, and low to high, where it lies with 95 % confidence.

    Both ends are None where the values cannot say: a single one, or equal ones without bounds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def margin(self) -> float:
        """Half the interval's width; 0 without one."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


def estimate(values: Sequence[float], shares: bool = False) -> Estimate:
    """The mean of values and its 95 % interval; shares: they lie between 0 and 1.

    Shares that are all 0 or 1 are a proportion (Wilson). With ties at 1/2, and where all are equal,
    one more of 0 and of 1 is counted; else the interval is Student's, cut at 0 and 1. Raises
    ValueError without values, and for shares beyond 0 and 1.
    """
    return _estimate(values, (0.0, 1.0) if shares else None)


def paired(values: Sequence[float], reference: Sequence[float], shares: bool = False) -> Estimate:
    """The mean of values - reference, sample by sample, and its 95 % interval.

    What varies between samples cancels. shares: both lie between 0 and 1. Raises ValueError for
    lists of different lengths, or empty ones.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(
            f"paired: {len(values)} and {len(reference)} samples, expected as many, at least 1"
        )
    differences = [a - b for a, b in zip(values, reference)]
    return _estimate(differences, (-1.0, 1.0) if shares else None)


def of_sums(total: float, squares: float, n: int) -> Estimate:
    """As `estimate`, of n values of which only their sum and the sum of their squares are kept."""
    mean = total / n
    variance = max(0.0, squares / n - mean * mean) * n / max(1, n - 1)
    if n == 1 or not variance > 0:
        return Estimate(mean, None, None, n)
    return _student(mean, variance, n)


def stratified(strata: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the strata's means, each counting the same, and its 95 % interval.

    Its variance is sum_k s_k^2 / n_k / K^2; a stratum of one value adds to the mean alone. Raises
    ValueError for an empty stratum, or none.
    """
    if not strata or not all(strata):
        raise ValueError("stratified: expected strata of at least 1 value")
    mean, n = _mean([_mean(part) for part in strata]), sum(map(len, strata))
    parts = [(_variance(part) / len(part), len(part) - 1) for part in strata if len(part) > 1]
    square = math.fsum(v for v, _ in parts)
    if not (square > 0 and math.isfinite(square)):
        return Estimate(mean, None, None, n)
    freedom = square**2 / math.fsum(v**2 / f for v, f in parts)
    # Whole degrees, rounded down, are a little wider.
    width = student(math.floor(freedom + 1e-9)) * math.sqrt(square) / len(strata)
    return Estimate(mean, mean - width, mean + width, n)


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation, None for a single value."""
    return math.sqrt(_variance(values)) if len(values) > 1 else None


@functools.lru_cache(maxsize=1024)
def student(freedom: float) -> float:
    """The t that 95 % of Student's distribution lies within, on both sides; freedom >= 1.

    The share within t is I_z(1/2, freedom/2) at z = t^2 / (freedom + t^2), the regularised
    incomplete beta function.
    """
    from mpmath import betainc, findroot

    def beyond(t: float) -> float:
        z = t * t / (freedom + t * t)
        return LEVEL - betainc(0.5, freedom / 2, 0, z, regularized=True)

    # Between the quantiles of a normal and of one degree of freedom.
    return float(findroot(beyond, (1.95, 12.8), solver="anderson"))


def _estimate(values: Sequence[float], bounds: tuple[float, float] | None) -> Estimate:
    n = len(values)
    if not n:
        raise ValueError("estimate: no values, expected at least 1")
    mean, distinct = _mean(values), set(values)
    if not math.isfinite(mean):
        return Estimate(mean, None, None, n)
    if bounds is not None:
        low, high = bounds
        if not low <= min(distinct) <= max(distinct) <= high:
            raise ValueError(f"estimate: values beyond {low:g} and {high:g}, expected shares")
        if low == 0 and distinct <= {0, 1}:
            return Estimate(mean, *_wilson(mean, n), n)
        if len(distinct) == 1 or distinct <= {low, (low + high) / 2, high}:
            return Estimate(mean, *_with_both_ends(values, low, high), n)
    if len(distinct) == 1:
        return Estimate(mean, None, None, n)
    low, high = bounds or (-math.inf, math.inf)
    return _student(mean, _variance(values), n, low, high)


def _student(
    mean: float, variance: float, n: int, least: float = -math.inf, most: float = math.inf
) -> Estimate:
    width = student(n - 1) * math.sqrt(variance / n)
    return Estimate(mean, max(least, mean - width), min(most, mean + width), n)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = _normal()
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Where none or all are right, rounding would leave the end beside 0 or 1.
    return (0.0 if share == 0 else middle - width), (1.0 if share == 1 else middle + width)


def _with_both_ends(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Wald's interval of the values and one more of both ends, which always reaches the mean."""
    more = [*values, low, high]
    middle, n = _mean(more), len(more)
    width = _normal() * math.sqrt(_variance(more) * (n - 1)) / n
    mean = _mean(values)
    return max(low, min(mean, middle - width)), min(high, max(mean, middle + width))


def _normal() -> float:
    return NormalDist().inv_cdf((1 + LEVEL) / 2)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
