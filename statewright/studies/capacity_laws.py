"""How long to train and how far to recall, by the size of a state: intervals, fits, the papers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from statewright.studies.censored import Interval, Line, fit_line

LEAST_SIZES = 5
# arXiv:2410.07145, sections 5 and 7.2: states of 0.8 to 19.3 million numbers were trained.
FIRST_SIZE, LAST_SIZE = 0.8, 19.3
KILO = 1024


@dataclass(frozen=True)
class Law:
    """T [K tokens] = slope * x + offset (forget), or scale * (base^x - 1) + offset (recall).

    x: numbers in the state, in millions. `base` None is the line, of which `slope` is the factor.
    deviation: of the Gaussian error, K tokens.
    """

    slope: float
    offset: float
    base: float | None = None
    deviation: float = 0.0

    def __call__(self, millions: float) -> float:
        """K tokens; a line may fall below 0, where it says nothing."""
        if self.base is None:
            return self.slope * millions + self.offset
        return self.slope * (self.base**millions - 1) + self.offset

    def __str__(self) -> str:
        sign = "-" if self.offset < 0 else "+"
        rest = f"{sign} {abs(self.offset):.4g}"
        if self.base is None:
            return f"{self.slope:.4g} N_S {rest}"
        return f"{self.slope:.4g} ({self.base:.5g}^N_S - 1) {rest}"


PUBLISHED_FORGET = Law(5.172, -4.469)
PUBLISHED_RECALL = Law(4.756, -0.742, 1.365)


@dataclass(frozen=True)
class Point:
    """One size (millions of numbers) and seed, and where its length lies (K tokens)."""

    millions: float
    seed: int
    interval: Interval


@dataclass(frozen=True)
class Fitted:
    """A law, and the laws of resampled seeds: none if there is but one seed."""

    law: Law
    resampled: tuple[Law, ...]

    def band(self, millions: float, share: float = 0.95) -> tuple[float, float] | None:
        """The middle `share` of what the resampled laws say; the grid's own steps come on top."""
        if not self.resampled:
            return None
        values = [law(millions) for law in self.resampled]
        low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Sorted; ValueError unless they are different powers of two, at least one."""
    for length in lengths:
        if length < 1 or length & (length - 1):
            raise ValueError(f"lengths: {length} is no power of two, expected 64, 128, 256, ...")
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths: {list(lengths)}, expected at least one, none of them twice")
    return tuple(sorted(lengths))


def forget_interval(explodes: Mapping[int, bool]) -> Interval:
    """Where T_forget lies, in tokens, by what models trained at each length do beyond it.

    The smallest length that does not explode is an upper end; the length before it on the grid,
    T / 2 if no power of two was left out, is a lower end that is not included: (T / 2, T]. None
    below is (0, T], none that holds is (T, inf).
    """
    lengths = check_lengths(tuple(explodes))
    low = 0
    for length in lengths:
        if not explodes[length]:
            return Interval(low, length)
        low = length
    return Interval(low, math.inf)


def recall_interval(accuracy: Mapping[int, float], threshold: float = 0.95) -> Interval:
    """Where T_recall lies, in tokens: (T, next] for T the largest length that is good enough.

    Nothing recalled is (0, first]; the last of the grid recalled is (T, inf).
    """
    lengths = check_lengths(tuple(accuracy))
    good = [i for i, length in enumerate(lengths) if accuracy[length] >= threshold]
    if not good:
        return Interval(0, lengths[0])
    last = good[-1]
    return Interval(lengths[last], lengths[last + 1] if last + 1 < len(lengths) else math.inf)


def fit_forget(points: Sequence[Point], resamples: int = 200, seed: int = 0) -> Fitted:
    """The line of maximum likelihood through intervals (see `fit_line`), and its band.

    Resampled: each size's seeds with replacement. Raises ValueError for fewer than five sizes.
    """
    return _fit(points, _line, resamples, seed)


def fit_recall(points: Sequence[Point], resamples: int = 50, seed: int = 0) -> Fitted:
    """As `fit_forget`, for scale (base^x - 1) + offset: the best base of a search in its logarithm.

    For a given base the law is a line in base^x - 1.
    """
    return _fit(points, _exponential, resamples, seed)


def _fit(
    points: Sequence[Point],
    best: Callable[[Sequence[Point], Law | None], Law],
    resamples: int,
    seed: int,
) -> Fitted:
    sizes = sorted({p.millions for p in points})
    if len(sizes) < LEAST_SIZES:
        raise ValueError(
            f"sizes: {len(sizes)} different ones, expected at least {LEAST_SIZES} for a fit"
        )
    law = best(points, None)
    by_size = [[p for p in points if p.millions == x] for x in sizes]
    if max(map(len, by_size)) < 2:
        return Fitted(law, ())
    generator, found = np.random.default_rng(seed), []
    # On a coarse grid seeds agree: most draws have been fitted before.
    known: dict[tuple, Law | None] = {}
    for _ in range(resamples):
        drawn = [g[i] for g in by_size for i in generator.integers(len(g), size=len(g))]
        drawn.sort(key=_place)
        name = tuple(map(_place, drawn))
        if name not in known:
            try:
                known[name] = best(drawn, law)
            except ValueError:  # a draw in which every interval is open to the same side
                known[name] = None
        if known[name] is not None:
            found.append(known[name])
    return Fitted(law, tuple(found))


def _place(point: Point) -> tuple[float, float, float]:
    return point.millions, point.interval.low, point.interval.high


def _line(points: Sequence[Point], near: Law | None) -> Law:
    fitted = fit_line([p.millions for p in points], [p.interval for p in points])
    return Law(fitted.slope, fitted.offset, None, fitted.deviation)


def _exponential(points: Sequence[Point], near: Law | None) -> Law:
    x = np.array([p.millions for p in points])
    intervals = [p.interval for p in points]

    def at(rate: float) -> Line:
        return fit_line(np.expm1(rate * x), intervals)

    if near is None or near.base is None:
        # e^0.001 over the largest size is a line but for 0.05 %, e^12 a wall at the last size.
        rates, steps = np.geomspace(1e-3, 12, 25) / x.max(), 40
    else:
        rates, steps = math.log(near.base) * np.geomspace(0.5, 2, 5), 12
    scores = [at(rate).score for rate in rates]
    i, last = int(np.argmax(scores)), len(rates) - 1
    ends = rates[max(i - 1, 0)], rates[min(i + 1, last)]
    rate = _golden(lambda r: at(r).score, *ends, steps)
    fitted = at(rate)
    return Law(fitted.slope, fitted.offset, math.exp(rate), fitted.deviation)


def _golden(score: Callable[[float], float], low: float, high: float, steps: int) -> float:
    """Where a function with one peak is highest, to 0.618^steps of the range."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = score(a), score(b)
    for _ in range(steps):
        if at_a >= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = score(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = score(b)
    return (low + high) / 2
