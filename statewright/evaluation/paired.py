"""Differences between two runs over the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Mean of the differences over n samples, and its standard error; None for one sample."""

    difference: float
    standard_error: float | None
    n: int


def paired(values: Sequence[float], reference: Sequence[float]) -> Paired:
    """Of values - reference, sample by sample: what varies between samples cancels.

    The standard error is sqrt(sum (d - mean d)^2 / (n - 1) / n). Raises ValueError for lists of
    different lengths, or empty ones.
    """
    if len(values) != len(reference) or not values:
        raise ValueError(
            f"paired: {len(values)} and {len(reference)} samples, expected as many, at least 1"
        )
    n = len(values)
    differences = [a - b for a, b in zip(values, reference)]
    mean = math.fsum(differences) / n
    if n == 1:
        return Paired(mean, None, 1)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    return Paired(mean, math.sqrt(variance / n), n)
