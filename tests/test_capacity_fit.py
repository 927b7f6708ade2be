"""Thresholds as intervals, and laws through intervals: the capacity study's mathematics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from statewright.studies import censored
from statewright.studies.capacity_laws import (
    PUBLISHED_FORGET,
    PUBLISHED_RECALL,
    Law,
    Point,
    fit_forget,
    fit_recall,
    forget_interval,
    recall_interval,
)
from statewright.studies.censored import Interval, fit_line

INF = math.inf
SIZES = (0.8, 1.6, 2.4, 4.8, 12.9, 19.3)


def exactly(law: Law) -> list[Point]:
    return [Point(x, 0, Interval(law(x), law(x))) for x in SIZES]


def on_the_grid(law: Law, sizes=SIZES, seeds: int = 3, noise: float = 0.2) -> list[Point]:
    """(T / 2, T] around a law's values, each seed's a little off."""
    generator, found = np.random.default_rng(0), []
    for x in sizes:
        for seed in range(seeds):
            value = law(x) * math.exp(noise * generator.normal())
            high = 2.0 ** math.ceil(math.log2(value))
            found.append(Point(x, seed, Interval(high / 2, high)))
    return found


def test_the_fitter_recovers_both_published_laws() -> None:
    line = fit_forget(exactly(PUBLISHED_FORGET)).law
    assert line.slope == pytest.approx(5.172, abs=1e-3)
    assert line.offset == pytest.approx(-4.469, abs=1e-3)
    curve = fit_recall(exactly(PUBLISHED_RECALL)).law
    assert curve.base == pytest.approx(1.365, abs=1e-3)
    assert curve.slope == pytest.approx(4.756, abs=1e-3)
    assert curve.offset == pytest.approx(-0.742, abs=1e-3)
    # The wrong sign of the offset would say 71 K at 370M.
    assert PUBLISHED_FORGET(12.9) == pytest.approx(62.25, abs=0.01)
    assert PUBLISHED_RECALL(12.9) == pytest.approx(257.8, abs=2)


def test_a_threshold_is_an_interval() -> None:
    assert forget_interval({64: True, 128: True, 256: False, 512: False}) == Interval(128, 256)
    assert forget_interval({64: False, 128: False}) == Interval(0, 64)
    assert forget_interval({64: True, 128: True}) == Interval(128, INF)
    # A length that was left out widens it: it is not known to explode.
    assert forget_interval({64: True, 256: False}) == Interval(64, 256)
    # The least that holds counts, whatever a longer one does.
    assert forget_interval({256: True, 128: False, 64: True}) == Interval(64, 128)
    assert recall_interval({256: 1.0, 512: 0.95, 1024: 0.94}) == Interval(512, 1024)
    assert recall_interval({256: 0.0, 512: 0.0}) == Interval(0, 256)
    assert recall_interval({256: 0.0, 512: 1.0}) == Interval(512, INF)
    with pytest.raises(ValueError, match="96 is no power of two"):
        forget_interval({64: True, 96: False})
    assert str(Interval(128, 256)) == "(128, 256]" and str(Interval(128, INF)) == "(128, inf)"


def test_intervals_with_a_known_answer() -> None:
    """Quartiles at -1 and 1: mean 0 and deviation 1 / Phi^-1(3/4); a half below 1: mean 1."""
    quarters = [Interval(-INF, -1), Interval(-1, 1), Interval(-1, 1), Interval(1, INF)]
    halves = [Interval(-INF, 1), Interval(1, INF)]
    line = fit_line([0, 0, 0, 0, 1, 1], quarters + halves)
    assert line.slope == pytest.approx(1, abs=1e-6)
    assert line.offset == pytest.approx(0, abs=1e-6)
    assert line.deviation == pytest.approx(1.4826022, abs=1e-5)
    assert line.score == pytest.approx(2 * math.log(0.5) + 4 * math.log(0.25) + 2 * math.log(2))


def likelihood(offset: float, slope: float, deviation: float, points: list[Point]) -> float:
    """Written from the definition, with the error function."""

    def below(value: float, mean: float) -> float:
        return 0.5 * (1 + math.erf((value - mean) / deviation / math.sqrt(2)))

    means = [slope * p.millions + offset for p in points]
    shares = [below(p.interval.high, m) - below(p.interval.low, m) for p, m in zip(points, means)]
    return sum(math.log(max(share, 1e-300)) for share in shares)


def test_no_line_nearby_is_likelier() -> None:
    points = on_the_grid(PUBLISHED_FORGET, SIZES[1:5], noise=0.6)
    found = fit_line([p.millions for p in points], [p.interval for p in points])
    best = likelihood(found.offset, found.slope, found.deviation, points)
    assert best == pytest.approx(found.score, abs=1e-6)
    generator = np.random.default_rng(0)
    narrowest = min(p.interval.high - p.interval.low for p in points)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for a, b, c in generator.normal(size=(50, 3)) * scale:
            deviation = max(found.deviation * math.exp(c), narrowest / 4)
            tried = (found.offset + 5 * a, found.slope + b, deviation)
            assert likelihood(*tried, points) <= best + 1e-9


def test_a_wrong_gradient_would_be_seen(monkeypatch) -> None:
    """The likelihood's derivatives against differences; a planted factor is caught."""
    x, low, high = np.array([0.0, 1.0, 2.0]), np.array([-1.0, 0.5, 2.0]), np.array([0.5, INF, 2.0])
    theta, step = np.array([0.3, -0.2, 1.1]), 1e-5

    def off() -> float:
        worst = 0.0
        _, gradient, hessian = censored._likelihood(theta, x, low, high)
        for i in range(3):
            moved = [theta + sign * step * np.eye(3)[i] for sign in (1, -1)]
            up, down = (censored._likelihood(t, x, low, high) for t in moved)
            worst = max(worst, abs((up[0] - down[0]) / 2 / step - gradient[i]))
            worst = max(worst, np.abs((up[1] - down[1]) / 2 / step - hessian[i]).max())
        return worst

    assert off() < 1e-7
    density = censored._density
    monkeypatch.setattr(censored, "_density", lambda u, share: 1.01 * density(u, share))
    assert off() > 1e-3


def test_laws_through_intervals_and_their_bands() -> None:
    points = on_the_grid(PUBLISHED_FORGET, SIZES[1:])
    fitted, again = fit_forget(points, 40, seed=1), fit_forget(points, 40, seed=1)
    assert fitted == again
    assert fit_forget(points, 40, seed=2).resampled != fitted.resampled
    for point in points:  # the line stays within a factor of two of what it went through
        middle = fitted.law(point.millions)
        assert point.interval.low / 2 <= middle <= 2 * point.interval.high
    low, high = fitted.band(12.9)
    assert low <= high and fitted.band(12.9, 0.5)[1] <= high
    curve = fit_recall(on_the_grid(PUBLISHED_RECALL), 3)
    assert curve.law.base == pytest.approx(1.365, abs=0.05)


def test_fits_that_cannot_be_made() -> None:
    few = [p for p in exactly(PUBLISHED_FORGET) if p.millions < 10]
    with pytest.raises(ValueError, match="4 different ones, expected at least 5"):
        fit_forget(few)
    with pytest.raises(ValueError, match="fewer than two sizes are bounded"):
        fit_forget([Point(x, 0, Interval(64, INF)) for x in SIZES])
    assert fit_forget(exactly(PUBLISHED_FORGET)).band(2.0) is None  # one seed has no spread
    with pytest.raises(ValueError, match="low <= high"):
        Interval(2, 1)
