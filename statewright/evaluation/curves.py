"""Results over an axis: loss by position, accuracy by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statewright.intervals import estimate
from statewright.tasks import by_depth


@dataclass(frozen=True)
class Curve:
    """y over x, each with its unit; interval: where y lies with 95 % (None: one sample)."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_unit: str
    y_unit: str
    interval: tuple[tuple[float, float] | None, ...] = ()


def loss_by_position(losses: Sequence[Tensor], points: int = 64) -> Curve:
    """Nats per token in at most `points` equal ranges of position; each losses[i] is (T_i,).

    x is the last token of a range (1: the first that is predicted). A sample counts in a range by
    the mean of its tokens there, and not at all where it has none.
    """
    longest = max(len(row) for row in losses)
    size = math.ceil(longest / points)
    x, found = [], []
    for begin in range(0, longest, size):
        parts = [row[begin : begin + size].double() for row in losses]
        means = [float(part.mean()) for part in parts if len(part)]
        x.append(float(min(begin + size, longest)))
        found.append(estimate(means))
    y, spans = tuple(e.mean for e in found), tuple(e.interval for e in found)
    return Curve("loss by position", tuple(x), y, "tokens", "nats per token", spans)


def score_by_depth(
    places: Sequence[float], values: Sequence[float], unit: str, bins: int = 10
) -> Curve:
    """Mean score in equal ranges of depth, at their middles; empty ranges are left out."""
    found = by_depth(places, values, bins)  # type: ignore[arg-type]
    kept = [(i, v) for i, v in enumerate(found) if not math.isnan(v)]
    x = tuple((i + 0.5) / bins for i, _ in kept)
    return Curve("score by depth", x, tuple(v for _, v in kept), "share of the input", unit)


def bits_per_byte(losses: Sequence[Tensor], texts: Sequence[str]) -> float:
    """Sum of nats / ln 2 / UTF-8 bytes; texts[i] is what losses[i] predict."""
    total = torch.stack([row.double().sum() for row in losses]).sum()
    return float(total) / math.log(2) / max(sum(len(t.encode()) for t in texts), 1)
