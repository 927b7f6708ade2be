"""What one look at a recurrent state says, per head, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from statewright.state import MatrixState, ModelState, State, VectorState

QUANTITIES = ("mean", "variance", "rms", "norm", "outliers", "outlier_share")
# Mamba has a head per channel: thousands of curves say no more than these.
MAX_HEADS = 64
# An entry is an outlier channel beyond so many standard deviations of the bulk, which is what lies
# within so many of all entries' (medians would be more robust, and dearer than the forward pass).
OUTLIER, BULK = 6.0, 3.0
NUM_BINS = 40


def recurrent_states(state: ModelState) -> Iterator[tuple[str, State]]:
    """Yield (layer, state) for what a recurrence carries: "3", or "3.1" inside a hybrid layer."""
    for i, layer in enumerate(state.layers):
        parts = layer if isinstance(layer, tuple) else (layer,)
        for j, part in enumerate(parts):
            if isinstance(part, (MatrixState, VectorState)):
                yield (str(i) if len(parts) == 1 else f"{i}.{j}"), part


def carried_by_head(state: State) -> Tensor:
    """The state as (B, H, entries) float32; a vector (of an LSTM: its cell) is one head.

    More than MAX_HEADS heads are pooled, neighbours together.
    """
    if isinstance(state, MatrixState):
        x = state.S.detach().flatten(2)
    else:
        x = state.extra.get("c", state.h).detach().unsqueeze(1)
    B, H, _ = x.shape
    return x.float().reshape(B, num_groups(H), -1)


def num_groups(num_heads: int) -> int:
    """The largest number of equal groups of heads that is at most MAX_HEADS."""
    return next(n for n in range(min(num_heads, MAX_HEADS), 0, -1) if num_heads % n == 0)


def pooled(values: Tensor) -> Tensor:
    """(..., H) -> (..., groups): the largest of each group of heads."""
    return values.unflatten(-1, (num_groups(values.shape[-1]), -1)).amax(-1)


def statistics(x: Tensor) -> Tensor:
    """x (B, H, entries) -> (QUANTITIES, H), each the mean over rows.

    Unbiased variance; norm is Frobenius'; outliers counts the entries further than OUTLIER
    standard deviations of the bulk from the mean, and their share is of the squared norm.
    """
    variance, mean = torch.var_mean(x, -1, correction=min(1, x.shape[-1] - 1))
    squares, distance = x.square(), (x - mean.unsqueeze(-1)).square()
    total = squares.sum(-1)
    bulk = distance <= BULK**2 * variance.unsqueeze(-1)
    spread = (distance * bulk).sum(-1) / bulk.sum(-1).clamp(min=1)
    outlier = distance > OUTLIER**2 * spread.clamp(min=1e-30).unsqueeze(-1)
    share = (squares * outlier).sum(-1) / total.clamp(min=1e-30)
    rms = (total / x.shape[-1]).sqrt()
    found = (mean, variance, rms, total.sqrt(), outlier.sum(-1).float(), share)
    return torch.stack([values.mean(0) for values in found])


@dataclass(frozen=True)
class Histogram:
    """Values of one head's state at two times, in the same equal bins from -limit to limit."""

    head: int
    limit: float
    before: tuple[int, ...]
    after: tuple[int, ...]


def histogram(head: int, before: Tensor, after: Tensor) -> Histogram:
    """Count the entries of one head at two times."""
    limit = float(torch.maximum(before.abs().max(), after.abs().max()).clamp(min=1e-12))
    counts = [torch.histc(x, NUM_BINS, -limit, limit).long().tolist() for x in (before, after)]
    return Histogram(head, limit, *(tuple(c) for c in counts))


def first_not_finite(state: ModelState) -> tuple[str, int] | None:
    """(layer, head) of the first NaN or Inf in a recurrent state, or None."""
    for layer, part in recurrent_states(state):
        if isinstance(part, MatrixState):
            x = part.S.flatten(2)
        else:
            x = part.extra.get("c", part.h).unsqueeze(1)
        # A sum is one cheap pass; it can overflow by itself, so it only raises the suspicion.
        if not torch.isfinite(x.sum()):
            wrong = ~torch.isfinite(x).all(-1).all(0)
            if wrong.any():
                return layer, int(wrong.nonzero()[0])
    return None
