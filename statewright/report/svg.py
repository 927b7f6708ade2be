"""Line charts as inline SVG: the few marks the pages need, the same bytes for the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40
# Colours of the style; a series beyond them is dashed, and no two shapes in a row are alike.
COLOURS = 8
_SHAPES = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "M-3.3-3.3h6.6v6.6h-6.6z",
    "M0-4.4L4.2 3.2h-8.4z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.4L4.2-3.2h-8.4z",
    "M-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z",
    "M-4.6-1.8h9.2v3.6h-9.2z",
    "M-1.8-4.6h3.6v9.2h-3.6z",
)


def kind_of(number: int) -> str:
    """The classes of a series' line: its colour, and dashes beyond the colours there are."""
    return f"s{number % COLOURS}" + (f" d{number // COLOURS}" if number >= COLOURS else "")


def symbol(x: float, y: float, number: int) -> str:
    shape = _SHAPES[number % len(_SHAPES)]
    return (
        f'<path class="mark s{number % COLOURS}" d="{shape}" '
        f'transform="translate({x:.1f} {y:.1f})"/>'
    )


@dataclass(frozen=True)
class Axis:
    """Data from `low` to `high`; log for a logarithmic one; binary: its ticks are powers of two."""

    label: str
    low: float
    high: float
    log: bool = False
    binary: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high, never outside."""
        low, high = self.low, self.high
        if self.log:
            value = max(value, low)
            low, high, value = math.log(low), math.log(high), math.log(value)
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """At most about `most` round values inside, and their labels."""
        if self.log:
            base = 2.0 if self.binary else 10.0
            first = math.ceil(math.log(self.low, base) - 1e-9)
            last = math.floor(math.log(self.high, base) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / most))
            values = [base**i for i in range(first, last + 1, step)]
            if len(values) > 1:
                return [(v, count(v) if self.binary else plain(v)) for v in values]
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        values = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(v, plain(v)) for v in values]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(max(least, 1e-12)))
    return next((m * power for m in (1, 2, 5) if m * power >= least), 10 * power)


def plain(value: float) -> str:
    """A short decimal: 0.5, 12, 3e5."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.6g}"


def count(value: float) -> str:
    """Tokens: 512, 4k, 1M, in units of 1,024."""
    number = round(value)
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


@dataclass
class Chart:
    """One figure: `title` and `description` are read out to whoever does not see it."""

    title: str
    description: str
    x: Axis
    y: Axis
    width: int = 400
    height: int = 250
    marks: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        inner_width = self.width - _LEFT - _RIGHT
        inner_height = self.height - _TOP - _BOTTOM
        return (
            _LEFT + inner_width * self.x.share(x),
            _TOP + inner_height * (1 - self.y.share(y)),
        )

    def line(self, points: Points, kind: str) -> None:
        """A polyline; points that are not numbers are left out."""
        whole = [self.at(x, y) for x, y in points if y is not None and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in whole)
        if path:
            self.marks.append(f'<polyline class="{kind}" points="{path}"/>')

    def dots(self, points: Points, kind: str) -> None:
        for x, y in points:
            cx, cy = self.at(x, y)
            self.marks.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')

    def symbols(self, points: Points, number: int) -> None:
        """A mark of its own shape and colour for each series, at about nine of its points."""
        whole = [p for p in points if p[1] is not None and math.isfinite(p[1])]
        for x, y in whole[:: math.ceil(len(whole) / 9) or 1]:
            cx, cy = self.at(x, y)
            self.marks.append(symbol(cx, cy, number))

    def whiskers(self, points: Points, spans: Sequence[Any], number: int) -> None:
        """From the lower to the upper end of each point's interval (a pair, or None)."""
        for (x, y), span in zip(points, spans):
            if y is not None and span and all(map(math.isfinite, (y, *span))):
                (x0, low), (_, high) = self.at(x, span[0]), self.at(x, span[1])
                self.behind.append(
                    f'<line class="whisker s{number % COLOURS}" x1="{x0:.1f}" x2="{x0:.1f}" '
                    f'y1="{low:.1f}" y2="{high:.1f}"/>'
                )

    def level(self, value: float, kind: str, label: str) -> None:
        """A horizontal line with its name above its right end; none outside the axis."""
        if not self.y.low <= value <= self.y.high:
            return
        x0, y = self.at(self.x.low, value)
        x1, _ = self.at(self.x.high, value)
        self.behind.append(f'<line class="{kind}" x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}"/>')
        self.behind.append(
            f'<text class="note" x="{x1 - 2}" y="{y - 4:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )

    def band(self, low: float, high: float, label: str) -> None:
        """A shaded range of x with its name at the bottom."""
        x0, top = self.at(low, self.y.high)
        x1, bottom = self.at(high, self.y.low)
        self.behind.append(
            f'<rect class="band" x="{x0:.1f}" y="{top:.1f}" width="{x1 - x0:.1f}" '
            f'height="{bottom - top:.1f}"/>'
            f'<text class="note" x="{x0 + 4:.1f}" y="{bottom - 6:.1f}">{escape(label)}</text>'
        )

    def steps(self, edges: Sequence[float], heights: Sequence[float], kind: str) -> None:
        """A histogram's outline; heights below the axis lie on it."""
        points = []
        for left, right, height in zip(edges, edges[1:], heights):
            points += [(left, max(height, self.y.low)), (right, max(height, self.y.low))]
        self.line([(edges[0], self.y.low), *points, (edges[-1], self.y.low)], kind)

    def render(self, name: str) -> str:
        """The svg element; `name` must be the page's only one."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-labelledby="{name}-t {name}-d">'
            f'<title id="{name}-t">{escape(self.title)}</title>'
            f'<desc id="{name}-d">{escape(self.description)}</desc>'
            f"{self._frame()}{''.join(self.behind)}{''.join(self.marks)}</svg>"
        )

    def _frame(self) -> str:
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        parts = []
        for value, label in self.y.ticks():
            _, y = self.at(self.x.low, value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for value, label in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
            )
        middle = (_LEFT + right) / 2
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(self.x.label)}</text>"
            f'<text x="10" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
            f'transform="rotate(-90 10 {(_TOP + bottom) / 2})">{escape(self.y.label)}</text>'
        )
        return "".join(parts)
