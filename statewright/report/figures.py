"""The figures of a diagnosis, from its JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from statewright.report.svg import Axis, Chart, count

# Layers that get figures of their own; the others did less.
MOST_LAYERS = 6
_KINDS = ("before", "after")


def tokens_axis(low: float, high: float, label: str = "tokens read") -> Axis:
    return Axis(label, low, high, log=True, binary=True)


def loss_chart(readings: Sequence[dict[str, Any]]) -> Chart:
    """Loss by position: inside the training length from windows, beyond it read on; the second
    reading, under a policy, beside the first."""
    first = readings[0]
    T, length, inside = first["train_length"], first["length"], first["in_window"]
    curves = [_curve(reading) for reading in readings]
    limit = inside + math.log(2)
    low = min(y for curve in curves for _, y in curve)
    high = max(limit, *(y for curve in curves for _, y in curve))
    low = max(0.0, low - 0.15 * (high - low))
    high += 0.08 * (high - low)
    chart = Chart(
        "Loss by position",
        "; ".join(_loss_words(reading) for reading in readings),
        tokens_axis(1, length),
        Axis("nats per token", low, high),
    )
    chart.band(1, T, f"trained on: {count(T)}")
    chart.level(limit, "limit", "2x perplexity")
    fresh = [(_middle(c["begin"], c["end"]), c["fresh"]) for c in first["comparisons"]]
    chart.line([(T, inside), *fresh], "fresh")
    chart.dots(fresh, "fresh-dot")
    for curve, kind in zip(curves, _KINDS):
        chart.line(curve, kind)
    return chart


def _curve(reading: dict[str, Any]) -> list[tuple[float, float]]:
    inside = [(_middle(max(1, b["begin"]), b["end"]), b["nats"]) for b in reading["inside"]]
    beyond = [b for b in reading["buckets"] if b["begin"] >= reading["train_length"]]
    return inside + [(_middle(b["begin"], b["end"]), b["nats"]) for b in beyond]


def _middle(begin: float, end: float) -> float:
    return math.sqrt(max(begin, 1) * end)


def _loss_words(reading: dict[str, Any]) -> str:
    beyond = [b["nats"] for b in reading["buckets"] if b["begin"] >= reading["train_length"]]
    policy = "no policy" if reading["policy"] == "none" else reading["policy"]
    return (
        f"under {policy}, {reading['in_window']:.2f} nats inside the training length, "
        f"{max(beyond):.2f} at worst beyond, {beyond[-1]:.2f} at the end"
    )


def shown_layers(reading: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers whose heads grew most, in the model's order."""
    layers = sorted(reading["layers"], key=lambda layer: -max(layer["growth"]))[:MOST_LAYERS]
    return [layer for layer in reading["layers"] if layer in layers]


def norm_chart(reading: dict[str, Any], layer: dict[str, Any], blamed: set[int]) -> Chart:
    """The Frobenius norm of every head at the probes."""
    rows = layer["statistics"]["norm"]
    flat = [value for row in rows for value in row if value and value > 0] or [1.0]
    low, high = min(flat), max(flat)
    low, high = (low / 2, high * 2) if high < 20 * low else (low, high)
    first, last = rows[reading["probes"].index(reading["train_length"])], rows[-1]
    grown = max((b / a for a, b in zip(first, last) if a > 0), default=1.0)
    chart = Chart(
        f"State norm, layer {layer['name']}",
        f"{len(last)} heads; from the training length to the end the norm of one grew at most "
        f"{grown:.1f}-fold",
        tokens_axis(reading["probes"][0], reading["length"]),
        Axis("norm", max(low, high * 1e-6), high, log=True),
        width=340,
        height=220,
    )
    chart.band(reading["probes"][0], reading["train_length"], "trained on")
    _heads(chart, reading["probes"], rows, blamed)
    return chart


def retention_chart(reading: dict[str, Any], layer: dict[str, Any], blamed: set[int]) -> Chart:
    """What one training length leaves of a head's state, by where that was."""
    rows = [gates["retention"] for gates in layer["gates"]]
    chart = Chart(
        f"Retention, layer {layer['name']}",
        f"share of a head's state left after {reading['train_length']:,} tokens; at most "
        f"{max(max(row) for row in rows):.1%}",
        tokens_axis(reading["watches"][0], max(reading["length"], 2 * reading["watches"][0])),
        Axis("share kept", 0.0, 1.0),
        width=340,
        height=220,
    )
    _heads(chart, reading["watches"], rows, blamed)
    return chart


def _heads(chart: Chart, at: Sequence[int], rows: Sequence[Sequence[float]], blamed: set) -> None:
    heads = range(len(rows[0]))
    for head in sorted(heads, key=lambda h: h in blamed):
        points = [(x, row[head]) for x, row in zip(at, rows)]
        chart.line(points, "head blamed" if head in blamed else "head")


def histogram_chart(reading: dict[str, Any], layer: dict[str, Any]) -> Chart:
    """Values of one head's state at the training length and at the end, counts on a log scale."""
    found = layer["histogram"]
    bins, limit = len(found["before"]), found["limit"]
    edges = [limit * (2 * i / bins - 1) for i in range(bins + 1)]
    most = max(*found["before"], *found["after"])
    chart = Chart(
        f"Values in the state, layer {layer['name']}, head {found['head']}",
        f"entries after {reading['train_length']:,} and after {reading['length']:,} tokens; "
        f"they reach from {-limit:.3g} to {limit:.3g}",
        Axis("value", -limit, limit),
        Axis("entries", 0.5, 2 * most, log=True),
        width=340,
        height=220,
    )
    chart.steps(edges, found["before"], "fresh")
    chart.steps(edges, found["after"], "before")
    return chart


def remembrance_chart(found: Sequence[dict[str, Any]], memory: int | None) -> Chart:
    """How much the prediction still changes when everything before the last tokens is cut off."""
    high = max(r["distance"] for r in found) * 1.08 or 1.0
    told = "" if memory is None else f"; the last {memory} tokens decide"
    chart = Chart(
        "Effective remembrance",
        "total variation between predictions from the last tokens alone and from "
        f"{found[0]['whole']}{told}",
        tokens_axis(1, found[0]["whole"], "last tokens given"),
        Axis("distance", 0.0, high),
        width=340,
        height=220,
    )
    points = [(r["context"], r["distance"]) for r in found]
    chart.line([*points, (found[0]["whole"], 0.0)], "before")
    chart.dots(points, "before-dot")
    return chart
