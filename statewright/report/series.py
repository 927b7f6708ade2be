"""Several series in one chart, with the table that says the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from statewright.report.html import number, scrolled
from statewright.report.svg import COLOURS, Axis, Chart, count, kind_of, symbol

# More lines than this cannot be told apart; the others are in the table.
MOST = 16
Span = Sequence[float]


@dataclass(frozen=True)
class Series:
    """Points (x, y); intervals: where each y lies with 95 %, or none; scatter: without a line."""

    name: str
    points: tuple[tuple[float, float], ...]
    intervals: tuple[Span | None, ...] = ()
    scatter: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: units in the labels; binary: x in powers of two, in k and M (of 1,024)."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    binary: bool = False
    zero: bool = False
    log_y: bool = False
    note: str = ""


def draw(plot: Plot, name: str) -> str:
    """A figure element: chart, legend, and its values as a table; `name` is the page's only one."""
    drawn = [s for s in plot.series if any(_fine(y) for _, y in s.points)]
    if not drawn:
        return ""
    shown = drawn[:MOST]
    chart = Chart(plot.title, _spoken(shown, plot), *_axes(plot, shown))
    for i, series in enumerate(shown):
        points = sorted(p for p in series.points if _fine(p[1]))
        if series.intervals:
            chart.whiskers(series.points, series.intervals, i)
        if len(points) > 1 and not series.scatter:
            chart.line(points, kind_of(i))
        chart.symbols(points, i)
    rest = len(drawn) - len(shown)
    note = plot.note + (f" {rest} more are in the table only." if rest else "")
    caption = f"<figcaption><b>{escape(plot.title)}.</b> {escape(note.strip())}</figcaption>"
    inside = _table(plot, drawn, chart)
    return (
        f'<figure class="read">{caption}{_legend(shown)}<div class="plot">{chart.render(name)}'
        f"</div><details><summary>Values</summary>{inside}</details></figure>"
    )


def _fine(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _axes(plot: Plot, shown: Sequence[Series]) -> tuple[Axis, Axis]:
    xs = [x for s in shown for x, y in s.points if _fine(y)]
    ys = [y for s in shown for _, y in s.points if _fine(y)]
    low, high = min(ys), max(ys)
    if plot.y == "accuracy":
        low, high = 0.0, max(1.0, high)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 0.1
    log_y = plot.log_y and low > 0
    if log_y:
        low, high = low / 1.05, high * 1.05
    else:
        low, high = (0.0 if plot.zero and low >= 0 else low - pad), high + pad
    first, last = min(xs), max(xs)
    log = plot.log_x and first > 0
    if first == last:
        first, last = (first / 2, last * 2) if log else (first - 0.5, last + 0.5)
    return (
        Axis(plot.x, first, last, log=log, binary=plot.binary),
        Axis(plot.y, low, high, log=log_y),
    )


def _spoken(shown: Sequence[Series], plot: Plot) -> str:
    """Who begins and ends where: what a reader of the picture sees first."""
    parts = []
    for series in shown:
        points = sorted(p for p in series.points if _fine(p[1]))
        (x0, y0), (x1, y1) = points[0], points[-1]
        if len(points) == 1:
            parts.append(f"{series.name}: {number(y0)} at {number(x0)}")
        else:
            ends = f"{number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}"
            parts.append(f"{series.name}: {ends}")
    return f"{plot.y} over {plot.x}. " + "; ".join(parts) + ". The table below holds every value."


def _legend(shown: Sequence[Series]) -> str:
    items = []
    for i, series in enumerate(shown):
        line = "" if series.scatter else f'<polyline class="{kind_of(i)}" points="0,6 28,6"/>'
        mark = f'<svg viewBox="0 0 28 12" aria-hidden="true">{line}{symbol(14, 6, i)}</svg>'
        items.append(f"<li>{mark}{escape(series.name)}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def _table(plot: Plot, drawn: Sequence[Series], chart: Chart) -> str:
    """A row for every x; data-x and data-y are where the chart has it, for the script."""
    heads = "".join(
        f'<th scope="col" data-s="{i % COLOURS}">{escape(s.name)}</th>' for i, s in enumerate(drawn)
    )
    values = [_by_x(series) for series in drawn]
    rows = []
    for x in sorted({x for found in values for x in found}):
        left = f"{chart.at(x, chart.y.low)[0]:.1f}"
        cells = "".join(_cell(found.get(x), chart, i) for i, found in enumerate(values))
        label = count(x) if plot.binary and x >= 1024 and x % 1024 == 0 else number(x)
        rows.append(f'<tr data-x="{left}"><th scope="row">{label}</th>{cells}</tr>')
    top = f'<thead><tr><th scope="col">{escape(plot.x)}</th>{heads}</tr></thead>'
    return scrolled(plot.y, f"{top}<tbody>{''.join(rows)}</tbody>")


def said(value: float, span: Span | None) -> str:
    """`0.95 [0.76, 0.99]`."""
    shown = number(float(value))
    return shown if span is None else f"{shown} [{number(span[0])}, {number(span[1])}]"


def _by_x(series: Series) -> dict[float, tuple[float, Span | None]]:
    spans = series.intervals or (None,) * len(series.points)
    return {x: (y, span) for (x, y), span in zip(series.points, spans) if _fine(y)}


def _cell(found: tuple[float, Span | None] | None, chart: Chart, i: int) -> str:
    if found is None:
        return "<td></td>"
    y, span = found
    place = f' data-y="{chart.at(chart.x.low, y)[1]:.1f}"' if i < MOST else ""
    return f"<td{place}>{said(y, span)}</td>"
