"""The training length that a state needs and the range it can recall, with honest bands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from statewright.studies.capacity_laws import (
    FIRST_SIZE,
    KILO,
    LAST_SIZE,
    PUBLISHED_FORGET,
    PUBLISHED_RECALL,
    Fitted,
    Law,
)
from statewright.studies.capacity_table import fits, main_system, points

# The published ordinates lie on a grid of powers of two, and the 780M model breaks the line.
PUBLISHED_FACTOR = 2.0
# Outside the sizes that were trained nobody has measured anything.
EXTRAPOLATED_FACTOR = 10.0
PUBLISHED = "published"
# An exponential law has no end; the integers of JSON's readers do.
_MOST = 2.0**52


@dataclass(frozen=True)
class Estimate:
    """T_`kind` by one law, in tokens; low to high is the band. tokens 0: the law says nothing."""

    kind: str
    source: str
    tokens: int
    low: int
    high: int
    extrapolated: bool
    note: str


@dataclass(frozen=True)
class Plan:
    """For a state of `numbers`: train on texts of `train_length` (a power of two), if one is known.

    It is the upper end of the forgetting threshold's band, by the results if they were given.
    """

    numbers: int
    train_length: int
    estimates: tuple[Estimate, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(numbers: int, found: Mapping[str, Any] | None = None) -> Plan:
    """For a state of `numbers`, by arXiv:2410.07145's laws and by one's own capacity results.

    The published ones are guides to an order of magnitude: five points each, known to a factor of
    two, of Mamba-2 on web text. Raises ValueError for a state without a fixed size, and results
    that allow no fit of T_forget.
    """
    if numbers < 1:
        raise ValueError("plan: the model has no matrix state of a fixed size to plan for")
    millions = numbers / 1e6
    laws = {"forget": PUBLISHED_FORGET, "recall": PUBLISHED_RECALL}
    estimates = [_published(kind, law, millions) for kind, law in laws.items()]
    if found is not None:
        estimates = [*_of_results(found, millions), *estimates]
    first = next((e for e in estimates if e.kind == "forget"), None)
    length = 0 if first is None or not first.tokens else 2 ** math.ceil(math.log2(first.high))
    return Plan(numbers, length, tuple(estimates))


def _published(kind: str, law: Law, millions: float) -> Estimate:
    outside = not FIRST_SIZE <= millions <= LAST_SIZE
    factor = EXTRAPOLATED_FACTOR if outside else PUBLISHED_FACTOR
    note = "an order-of-magnitude guide: five points known to a factor of two"
    if outside:
        note = f"extrapolated: only states of {FIRST_SIZE} to {LAST_SIZE} M numbers were trained"
    value = _tokens(law, millions)
    if value < 1:
        note = f"below 0 at {millions:.4g} M: the law says nothing for so small a state"
        return Estimate(kind, PUBLISHED, 0, 0, 0, outside, note)
    low, high = value / factor, value * factor
    return Estimate(kind, PUBLISHED, round(value), round(low), _whole(high), outside, note)


def _of_results(found: Mapping[str, Any], millions: float) -> list[Estimate]:
    system, estimates = main_system(found), []
    laws = fits(found, system)
    if not isinstance(laws.get("forget"), Fitted):
        why = laws.get("forget", "no model was read on beyond its training length")
        raise ValueError(f"plan: the results allow no fit ({why})")
    for kind, fitted in laws.items():
        if isinstance(fitted, str) or kind == "passed":
            continue
        sizes = [point.millions for point in points(found, kind, system)]
        outside = not min(sizes) <= millions <= max(sizes)
        source = f"results, {system}"
        note = f"measured from {min(sizes):.4g} to {max(sizes):.4g} M numbers"
        note = f"extrapolated: {note}" if outside else note
        value = _tokens(fitted.law, millions)
        if value < 1:
            estimates.append(Estimate(kind, source, 0, 0, 0, outside, f"below 0; {note}"))
            continue
        factor = EXTRAPOLATED_FACTOR if outside else PUBLISHED_FACTOR
        # The seeds' band, but never less than the grid's own steps.
        band = fitted.band(millions) or (fitted.law(millions), fitted.law(millions))
        low = max(0.0, min(KILO * band[0], value / factor))
        high = max(KILO * band[1], value * factor)
        whole = round(value), round(low), _whole(high)
        estimates.append(Estimate(kind, source, *whole, outside, note))
    return estimates


def _tokens(law: Law, millions: float) -> float:
    try:
        return min(KILO * law(millions), _MOST)
    except OverflowError:
        return _MOST


def _whole(value: float) -> int:
    return round(min(value, _MOST))
