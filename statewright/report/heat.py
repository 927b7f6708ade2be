"""Heat maps that are tables, and stacked bars: numbers stand in every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from statewright.report.html import scrolled, size
from statewright.report.svg import COLOURS

_WIDTH, _ROW, _BAR = 400, 40, 16


def heat_table(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
) -> str:
    """Shares (0 to 1) as per cent on a shade; an empty cell was not measured."""
    heads = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, values))}</tr>'
        for name, values in rows
    )
    top = f'<thead><tr><th scope="col">{escape(corner)}</th>{heads}</tr></thead>'
    return scrolled(caption, f"{top}<tbody>{body}</tbody>", "heat")


def _cell(value: float | None) -> str:
    if value is None:
        return '<td style="--p:0%"></td>'
    share = round(100 * min(1.0, max(0.0, value)))
    dark = ' class="dark"' if share > 55 else ""
    return f'<td{dark} style="--p:{share}%">{share}</td>'


def stacked(title: str, rows: Mapping[str, Mapping[str, int]], name: str) -> str:
    """One bar per row, its parts by kind in bytes, all on one scale; a table must say it too."""
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    most = max((sum(parts.values()) for parts in rows.values()), default=0)
    if not most:
        return ""
    drawn, y = [], 0
    for label, parts in rows.items():
        total = sum(parts.values())
        drawn.append(
            f'<text x="0" y="{y + 13}">{escape(_short(label))}</text>'
            f'<text x="{_WIDTH}" y="{y + 13}" text-anchor="end">{size(total)}</text>'
        )
        x = 0.0
        for kind, held in parts.items():
            wide = _WIDTH * held / most
            drawn.append(_part(x, y + 18, wide, kind, held, kinds.index(kind)))
            x += wide
        y += _ROW
    told = "; ".join(
        f"{label}: " + ", ".join(f"{kind} {size(held)}" for kind, held in parts.items())
        for label, parts in rows.items()
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 28 12" aria-hidden="true"><rect class="part k{i % COLOURS}" '
        f'x="8" width="12" height="12"/></svg>{escape(kind)}</li>'
        for i, kind in enumerate(kinds)
    )
    return (
        f'<figure><figcaption><b>{escape(title)}</b></figcaption><ul class="key">{legend}</ul>'
        f'<svg viewBox="0 0 {_WIDTH} {y}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(told)}</desc>'
        f"{''.join(drawn)}</svg></figure>"
    )


def _part(x: float, y: float, wide: float, kind: str, held: int, i: int) -> str:
    inside = ""
    if wide > 7.5 * len(kind) + 8:
        inside = f'<text class="note inside" x="{x + 4:.1f}" y="{y + 12}">{escape(kind)}</text>'
    return (
        f'<g><title>{escape(kind)}: {size(held)}</title><rect class="part k{i % COLOURS}" '
        f'x="{x:.1f}" y="{y}" width="{max(wide, 0.5):.1f}" height="{_BAR}"/>{inside}</g>'
    )


def _short(label: str, most: int = 44) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"
