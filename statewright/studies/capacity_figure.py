"""A panel each: training lengths at which a state forgets, lengths from which it recalls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from statewright.studies.capacity_laws import (
    FIRST_SIZE,
    KILO,
    LAST_SIZE,
    Fitted,
    Law,
)
from statewright.studies.capacity_table import LAWS, finite_end, fits, main_system, measured

_COLORS = {"low-decay": "tab:green", "official": "tab:blue", "transformer": "tab:red"}


def draw_capacity(figure: Any, found: dict[str, Any]) -> None:
    """Intervals as bars over the state's size, the fitted law with its band, the published law."""
    system = main_system(found)
    laws = fits(found, system)
    panels = figure.subplots(1, max(1, len(laws)), squeeze=False)
    for axes, (kind, fitted) in zip(panels[0], laws.items()):
        _intervals(axes, found, kind)
        _published(axes, LAWS[kind][1])
        if isinstance(fitted, Fitted):
            sizes = [one.millions for one in measured(found["cells"]) if one.system == system]
            _fitted(axes, fitted, min(sizes), max(sizes))
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.set_xlabel("numbers in the state (millions)")
        axes.set_ylabel(f"T_{kind} (tokens)")
        axes.legend(fontsize=6)


def _intervals(axes: Any, found: dict[str, Any], kind: str) -> None:
    shown: list[str] = []
    for one in measured(found["cells"]):
        interval = getattr(one, kind)
        if interval is None:
            continue
        first = one.system not in shown
        shown += [one.system] if first else []
        # Systems and seeds stand beside each other.
        x = one.millions * 1.15 ** shown.index(one.system) * 1.03**one.seed
        low = interval.low or interval.high / 2
        high = finite_end(interval, 2 * interval.low)
        color = _COLORS.get(one.system, "tab:gray")
        label = one.system if first else None
        axes.plot([x, x], [low, high], color=color, linewidth=2, label=label)
        if math.isinf(interval.high):
            axes.plot(x, high, "^", color=color, markersize=4)
        if not interval.low:
            axes.plot(x, low, "v", color=color, markersize=4)


def _published(axes: Any, law: Law) -> None:
    x = np.geomspace(FIRST_SIZE, LAST_SIZE, 100)
    y = np.array([KILO * law(value) for value in x])
    axes.plot(x[y > 0], y[y > 0], "--", color="black", linewidth=1, label=f"published: {law}")


def _fitted(axes: Any, fitted: Fitted, low: float, high: float) -> None:
    x = np.geomspace(low, high, 100)
    y = np.array([KILO * fitted.law(value) for value in x])
    axes.plot(x[y > 0], y[y > 0], color="tab:green", linewidth=1, label=f"fitted: {fitted.law}")
    if fitted.resampled:
        band = KILO * np.array([fitted.band(value) for value in x])
        floor = np.maximum(band, 1.0)
        axes.fill_between(x, floor[:, 0], floor[:, 1], color="tab:green", alpha=0.2, linewidth=0)
