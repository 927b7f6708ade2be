"""A line through intervals: maximum likelihood with a Gaussian error, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# The least error that is believed, in steps of the grid: a line that hits every interval would
# otherwise have none, and no line through them would be better than another.
_LEAST_STEP = 0.25
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Interval:
    """Somewhere in (low, high]; low = high is a value that is known."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high or not (math.isfinite(self.low) or math.isfinite(self.high)):
            raise ValueError(f"interval: low={self.low}, high={self.high}, expected low <= high")

    def scaled(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.high * factor)

    def __str__(self) -> str:
        def said(value: float) -> str:
            return f"{value:,.0f}" if math.isfinite(value) else "inf"

        return f"({said(self.low)}, {said(self.high)}{']' if math.isfinite(self.high) else ')'}"


@dataclass(frozen=True)
class Line:
    """y = slope x + offset, Gaussian error `deviation`; score: the higher, the likelier."""

    slope: float
    offset: float
    deviation: float
    score: float


def fit_line(x: Sequence[float] | np.ndarray, intervals: Sequence[Interval]) -> Line:
    """Maximise prod_i [Phi((high_i - m_i) / s) - Phi((low_i - m_i) / s)], m_i = slope x_i + offset.

    The likelihood is concave in (offset / s, slope / s, 1 / s), so Newton's method finds the one
    maximum. s is at least a quarter of the narrowest interval; values that are all known give
    least squares. Raises ValueError if the intervals do not bound a line from both sides at two x.
    """
    x = np.asarray(x, dtype=np.float64)
    low = np.array([i.low for i in intervals], dtype=np.float64)
    high = np.array([i.high for i in intervals], dtype=np.float64)
    _check(x, low, high)
    if np.array_equal(low, high):
        return _least_squares(x, low)
    # In units of order one, Newton's method needs no care.
    ends = np.concatenate([low, high])
    width, height = max(np.abs(x).max(), 1e-300), np.abs(ends[np.isfinite(ends)]).max()
    low, high = low / height, high / height
    widths = (high - low)[(high > low) & np.isfinite(high - low)]
    most = 1 / (_LEAST_STEP * (widths.min() if len(widths) else 1e-3))
    theta, score = _climb(x / width, low, high, most)
    slope, offset = theta[1] / theta[2] * height / width, theta[0] / theta[2] * height
    return Line(float(slope), float(offset), float(height / theta[2]), score)


def _check(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    if len(x) != len(low) or not np.isfinite(x).all():
        raise ValueError(f"fit_line: {len(x)} sizes for {len(low)} intervals, expected as many")
    bounded = np.intersect1d(x[np.isfinite(low)], x[np.isfinite(high)])
    if len(bounded) < 2:
        raise ValueError(
            "fit_line: fewer than two sizes are bounded from below and from above; longer or "
            "shorter lengths would bound them"
        )


def _least_squares(x: np.ndarray, y: np.ndarray) -> Line:
    design = np.stack([np.ones_like(x), x], 1)
    scale = np.maximum(np.abs(design).max(0), 1e-300)
    (offset, slope), *_ = np.linalg.lstsq(design / scale, y, rcond=None)
    offset, slope = offset / scale[0], slope / scale[1]
    deviation = float(np.sqrt(np.mean((y - slope * x - offset) ** 2)))
    return Line(float(slope), float(offset), deviation, -math.log(max(deviation, 1e-300)))


def _climb(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, most: float
) -> tuple[np.ndarray, float]:
    """theta = (offset, slope, 1) / s by damped Newton steps, 1 / s at most `most`."""
    below, above = np.where(np.isfinite(low), low, high - 1), np.where(np.isfinite(high), high, 0)
    middle = np.where(np.isfinite(high), (below + above) / 2, low + 1)
    start = _least_squares(x, middle)
    inverse = min(most, 1 / max(start.deviation, 0.05))
    theta = np.array([start.offset * inverse, start.slope * inverse, inverse])
    score, gradient, hessian = _likelihood(theta, x, low, high)
    for _ in range(200):
        # At the bound, with the gradient pointing beyond it, 1 / s stays.
        free = [0, 1] if theta[2] >= most and gradient[2] > 0 else [0, 1, 2]
        if np.abs(gradient[free]).max() < 1e-8:
            break
        curved = hessian[np.ix_(free, free)] - 1e-12 * np.eye(len(free))
        step = np.zeros(3)
        step[free] = np.linalg.solve(-curved, gradient[free])
        taken = _damped(theta, step, score, (x, low, high), most)
        if taken is None:
            break
        gained = taken[1][0] - score
        theta, (score, gradient, hessian) = taken
        if gained < 1e-12:
            break
    return theta, score


def _damped(
    theta: np.ndarray, step: np.ndarray, score: float, data: tuple, most: float
) -> tuple[np.ndarray, tuple] | None:
    """The longest of step, step / 2, ... that raises the likelihood; None if none does."""
    for halvings in range(40):
        tried = theta + step * 0.5**halvings
        if tried[2] > most:
            tried = np.array([tried[0], tried[1], most])
        if tried[2] <= 0:
            continue
        found = _likelihood(tried, *data)
        if math.isfinite(found[0]) and found[0] > score:
            return tried, found
    return None


def _likelihood(
    theta: np.ndarray, x: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The logarithm of the likelihood, its gradient and its Hessian in theta."""
    known, weights = low == high, np.stack([-np.ones_like(x), -x, low], 1)
    gradient, hessian, score = np.zeros(3), np.zeros((3, 3)), 0.0
    if known.any():
        w = weights[known]
        r, last = w @ theta, np.array([0.0, 0.0, 1.0])
        score += float((math.log(theta[2]) - _LOG_ROOT_2PI - r**2 / 2).sum())
        gradient += (-r[:, None] * w).sum(0) + len(w) * last / theta[2]
        hessian -= w.T @ w + len(w) * np.outer(last, last) / theta[2] ** 2
    if known.all():
        return score, gradient, hessian
    part = ~known
    w_low, w_high = _ends(x[part], low[part]), _ends(x[part], high[part])
    lower = np.where(np.isfinite(low[part]), w_low @ theta, -np.inf)
    upper = np.where(np.isfinite(high[part]), w_high @ theta, np.inf)
    log_share = _log_share(lower, upper)
    p_low, p_high = _density(lower, log_share), _density(upper, log_share)
    each = p_high[:, None] * w_high - p_low[:, None] * w_low
    bend_low, bend_high = (
        p_low * np.where(np.isfinite(lower), lower, 0),
        p_high * np.where(np.isfinite(upper), upper, 0),
    )
    hessian += (bend_low[:, None] * w_low).T @ w_low - (bend_high[:, None] * w_high).T @ w_high
    hessian -= each.T @ each
    return score + float(log_share.sum()), gradient + each.sum(0), hessian


def _ends(x: np.ndarray, end: np.ndarray) -> np.ndarray:
    return np.stack([-np.ones_like(x), -x, np.where(np.isfinite(end), end, 0)], 1)


def _density(u: np.ndarray, log_share: np.ndarray) -> np.ndarray:
    """phi(u) by the probability of the interval; 0 at infinity."""
    return np.exp(-(u**2) / 2 - _LOG_ROOT_2PI - log_share)


def _log_share(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """log(Phi(upper) - Phi(lower)), taken in the left tail, where nothing cancels."""
    swap = lower > 0
    a, b = np.where(swap, -upper, lower), np.where(swap, -lower, upper)
    log_a, log_b = _log_phi(a), _log_phi(b)
    with np.errstate(divide="ignore"):
        return log_b + np.log(-np.expm1(np.minimum(log_a - log_b, -1e-300)))


def _log_phi(u: np.ndarray) -> np.ndarray:
    return torch.special.log_ndtr(torch.from_numpy(np.ascontiguousarray(u))).numpy()
