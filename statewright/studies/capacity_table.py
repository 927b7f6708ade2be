"""The capacity study's thresholds and laws, from its one file of results and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statewright.studies.capacity_laws import (
    FIRST_SIZE,
    KILO,
    LAST_SIZE,
    PUBLISHED_FORGET,
    PUBLISHED_RECALL,
    Fitted,
    Point,
    fit_forget,
    fit_recall,
    forget_interval,
    recall_interval,
)
from statewright.studies.censored import Interval

NOTE = (
    "T_forget: the least training length beyond which no octave's perplexity on real text is more "
    "than {explosion:g} times that within, read to {reach} (a mean within where arXiv:2410.07145 "
    "takes the maximum: stricter). T_recall: the longest text with passkey >= {threshold:.0%}; "
    "T_passed: the same after more steps, by state passing; what more steps alone do is told by "
    "a run with passing_segments=1. Bands: 95 % over resampled seeds; the grid's own steps, a "
    "factor of two, come on top."
)
# How each is fitted, and what was published.
LAWS = {
    "forget": (fit_forget, PUBLISHED_FORGET),
    "recall": (fit_recall, PUBLISHED_RECALL),
    "passed": (fit_recall, PUBLISHED_RECALL),
}


@dataclass(frozen=True)
class Measured:
    """One system, size and seed: where its lengths lie (tokens), by what was run so far.

    passed: as recall, after state passing. odd: a longer training length explodes although a
    shorter one does not.
    """

    system: str
    size: str
    seed: int
    millions: float
    parameters: int
    forget: Interval | None
    recall: Interval | None
    passed: Interval | None
    odd: bool


def measured(cells: Mapping[str, Any]) -> list[Measured]:
    """In order of appearance; missing training lengths only widen the intervals."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        system, size, _, seed = key.split("/")
        groups.setdefault((system, size, int(seed.removeprefix("seed"))), []).append(cell)
    return [_measured(*name, group) for name, group in groups.items()]


def _measured(system: str, size: str, seed: int, group: list[dict[str, Any]]) -> Measured:
    explodes = {c["length"]: bool(c["explodes"]) for c in group if "explodes" in c}
    in_order = [explodes[length] for length in sorted(explodes)]
    return Measured(
        system,
        size,
        seed,
        group[0]["millions"],
        group[0]["parameters"],
        forget_interval(explodes) if explodes else None,
        _recall(group),
        _recall([cell["passed"] for cell in group if "passed" in cell]),
        any(later and not now for now, later in zip(in_order, in_order[1:])),
    )


def _recall(group: Sequence[Mapping[str, Any]]) -> Interval | None:
    """A size recalls what the best of its training lengths recalls."""
    recalls = [
        recall_interval({int(n): a for n, a in one["recall"].items()})
        for one in group
        if one.get("recall")
    ]
    return max(recalls, key=lambda i: i.low, default=None)


def rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """One per system and size: each seed's intervals of what was measured."""
    gathered: dict[tuple[str, str], list[Measured]] = {}
    for one in measured(found["cells"]):
        gathered.setdefault((one.system, one.size), []).append(one)
    shown = []
    for (system, size), seeds in sorted(
        gathered.items(), key=lambda e: (e[0][0], e[1][0].millions)
    ):
        first = seeds[0]
        state = "list" if system == "transformer" else f"{first.millions:.4g}"
        shown.append(
            {
                "system": system,
                "size": size,
                "N_S (M)": state,
                "parameters": f"{first.parameters:,}",
                "seeds": str(len(seeds)),
                **{f"T_{kind}": _listed(seeds, kind) for kind in kinds(found)},
            }
        )
    return shown


def _listed(seeds: Sequence[Measured], kind: str) -> str:
    """Each seed's interval; `!` where a longer training length explodes after all."""
    pairs = [(getattr(one, kind), one.odd and kind == "forget") for one in seeds]
    return "  ".join(f"{i}{'!' * odd}" for i, odd in pairs if i is not None) or "-"


def points(found: Mapping[str, Any], kind: str, system: str) -> list[Point]:
    """The intervals of a system in K tokens; kind: `forget`, `recall`, `passed`."""
    chosen = [one for one in measured(found["cells"]) if one.system == system]
    pairs = [(one, getattr(one, kind)) for one in chosen]
    return [Point(o.millions, o.seed, i.scaled(1 / KILO)) for o, i in pairs if i is not None]


def kinds(found: Mapping[str, Any]) -> list[str]:
    """What was measured of any system."""
    every = measured(found["cells"])
    return [kind for kind in LAWS if any(getattr(one, kind) is not None for one in every)]


def fits(found: Mapping[str, Any], system: str) -> dict[str, Fitted | str]:
    """The laws of what was measured of a system, or the reason why there is none yet."""
    laws: dict[str, Fitted | str] = {}
    for kind in kinds(found):
        try:
            laws[kind] = LAWS[kind][0](points(found, kind, system))
        except ValueError as error:
            laws[kind] = str(error)
    return laws


def main_system(found: Mapping[str, Any]) -> str:
    """The system that has most cells: the others are its controls."""
    names = [key.split("/")[0] for key in found["cells"]]
    return max(dict.fromkeys(names), key=names.count)


def said(found: Mapping[str, Any]) -> list[str]:
    """The fitted laws with their bands at the smallest and largest size, and the published ones."""
    system, settings = main_system(found), found["about"]["settings"]
    lines = []
    for kind, fitted in fits(found, system).items():
        law = f"T_{kind} [K] = "
        if isinstance(fitted, str):
            lines.append(f"{system}: no fit of T_{kind} ({fitted})")
        else:
            lines.append(f"{system}: {law}{fitted.law}{_bands(fitted, found, kind, system)}")
        lines.append(f"published, {FIRST_SIZE} to {LAST_SIZE} M: {law}{LAWS[kind][1]}")
    note = NOTE.format(
        explosion=settings["explosion"],
        reach=_reach(settings),
        threshold=settings["recall_threshold"],
    )
    return [*lines, note]


def _reach(settings: Mapping[str, Any]) -> str:
    tokens = settings.get("read_length", 0)
    return f"{tokens:,} tokens" if tokens else f"{settings['times']} training lengths"


def _bands(fitted: Fitted, found: Mapping[str, Any], kind: str, system: str) -> str:
    sizes = [point.millions for point in points(found, kind, system)]
    parts = []
    for x in (min(sizes), max(sizes)):
        band = fitted.band(x)
        if band is None:
            return "; one seed, so no band"
        low, high = (max(0.0, KILO * value) for value in band)
        parts.append(f"{low:,.0f} to {high:,.0f} tokens at {x:.4g} M")
    spread = f"error {KILO * fitted.law.deviation:,.0f} tokens"
    return f"; {', '.join(parts)}; {spread}"


def finite_end(interval: Interval, most: float) -> float:
    """For drawing: an interval without an upper end is drawn up to `most`."""
    return interval.high if math.isfinite(interval.high) else most
