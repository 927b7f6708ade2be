"""Sections of results that are named cells or plain rows: studies, capacity, books, examples."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from statewright.report.evaluation import byte_curves
from statewright.report.html import details, number, section, table, words
from statewright.report.series import MOST, Plot, Series, draw

Cells = Mapping[str, Mapping[str, Any]]
# Studies that print a table of their own, with the paper's numbers in it.
_STUDIES = {
    "selective-copy": "selective_copy",
    "char-lm": "char_lm",
    "chomsky": "chomsky",
    "listops": "listops",
    "train-cost": "train_cost",
}
_BOOKS = ("moby", "windows", "long", "decode", "throughput")
_AXES = {
    "octaves": ("Loss by position", "tokens read", "nats per token"),
    "block_nats": ("Loss by position", "part of the text, 256 tokens each", "nats per token"),
    "runs": ("Loss by position", "part of the text, 2,048 tokens each", "nats per token"),
    "recall": ("Recall by length", "tokens", "accuracy"),
    "peaks": ("Peak memory by length", "tokens", "bytes"),
}


def cells_section(found: Mapping[str, Any], name: str, title: str) -> str:
    """A study's own table if it has one, every number of every cell, and every curve in them."""
    cells, study = found["cells"], found.get("about", {}).get("study")
    own = []
    if study == "capacity":
        own = _capacity(found, name)
    elif study == "equal-bytes":
        own = _equal_bytes(found, name)
    elif study in _STUDIES:
        module = importlib.import_module(f"statewright.studies.{_STUDIES[study]}")
        own = [rows_table("", module.table(found))]
    elif all(key.split("/")[0] in _BOOKS for key in cells):
        own = _books(found, name)
    every = [{"": key, **_beside(key, result)} for key, result in cells.items()]
    drawn = "".join(_curves(cells, name))
    whole = rows_table("every cell", every)
    parts = [
        *own,
        f'<div class="figures">{drawn}</div>' if drawn else "",
        details(f"All {len(cells)} cells", whole) if own else whole,
        _made(found.get("about", {})),
    ]
    return section(name, title, parts)


def rows_section(found: Mapping[str, Any], field: str, name: str, title: str) -> str:
    """Rows of named values, as benchmarks and examples write them."""
    flat = [_flat(row) for row in found[field]]
    about = {k: v for k, v in found.items() if k != field}
    parts = [rows_table("", flat), _made(about.get("environment") or about)]
    return section(name, title, parts)


def rows_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns in the order in which they appear; the first names the row."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    said = [[number(_short(row.get(head))) for head in heads] for row in rows]
    return table(caption, [head.replace("_", " ") for head in heads], said) if heads else ""


def _short(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    return value


def _scalars(result: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not isinstance(v, (list, dict))}


def _beside(key: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's numbers; words that its key says already are left out."""
    return {k: v for k, v in _scalars(result).items() if not (isinstance(v, str) and v in key)}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One level of nesting becomes columns."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key} {k}" if k in row else k: v for k, v in _scalars(value).items()}
        elif not isinstance(value, list):
            flat[key] = value
    return flat


def _made(about: Mapping[str, Any]) -> str:
    """How it was made: the command first."""
    lines = []
    if about.get("command"):
        lines.append(f'<p class="soft">Made by <code>{escape(str(about["command"]))}</code>.</p>')
    versions = about.get("versions") or {}
    said = [f"{n} {v}" for n, v in versions.items() if v]
    said += [
        f"{k} {v}"
        for k, v in about.items()
        if isinstance(v, (str, int, float)) and k not in ("command", "study", "format")
    ]
    return "".join(lines) + (words("; ".join(said) + ".", "soft") if said else "")


def _curves(cells: Cells, name: str) -> list[str]:
    """A chart for every kind of curve; cells that share the beginning of their keys share one."""
    kinds: dict[tuple[str, str, str], dict[str, tuple]] = {}
    for key, result in cells.items():
        for kind, points in _found(result):
            kinds.setdefault(kind, {})[key] = points
    drawn = []
    for i, ((title, x, y), curves) in enumerate(kinds.items()):
        for j, (head, keys) in enumerate(_gathered(list(curves))):
            series = tuple(Series(key[len(head) :], curves[key]) for key in keys)
            steps = x.startswith("tokens")
            head = f": {head.strip('/')}" if head else ""
            plot = Plot(f"{title}{head}", x, y, series, log_x=steps, binary=steps)
            drawn.append(draw(plot, f"{name}-{i}-{j}"))
    return drawn


def _found(result: Mapping[str, Any]) -> list[tuple[tuple[str, str, str], tuple]]:
    """(title, x, y) and points of every list in a result that is a curve."""
    found = []
    for field, value in result.items():
        axes = _AXES.get(field)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found += _steps(value)
        elif axes and isinstance(value, dict):
            found.append((axes, tuple((float(x), y) for x, y in value.items())))
        elif axes and isinstance(value, list):
            pairs = value if value and isinstance(value[0], list) else enumerate(value, 1)
            found.append((axes, tuple((float(x), y) for x, y in pairs)))
    return [(kind, points) for kind, points in found if len(points) > 1]


def _steps(points: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str, str], tuple]]:
    """Measurements in training: one curve for each number but the step."""
    if "step" not in points[0]:
        return []
    names = [k for k in points[0] if k != "step" and isinstance(points[0][k], float)]
    return [
        (
            (f"{n.replace('_', ' ').capitalize()} in training", "step", n.replace("_", " ")),
            tuple((float(p["step"]), p[n]) for p in points if p.get(n) is not None),
        )
        for n in names
    ]


def _gathered(keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Keys by the least number of leading parts for which no group is too many for one chart.

    What is too many for one under every number of parts is dealt out to several.
    """
    for depth in range(min(key.count("/") for key in keys) + 1):
        groups: dict[str, list[str]] = {}
        for key in keys:
            head = "".join(f"{part}/" for part in key.split("/")[:depth])
            groups.setdefault(head, []).append(key)
        if all(len(group) <= MOST for group in groups.values()):
            break
    parts = []
    for head, group in groups.items():
        size = -(-len(group) // -(-len(group) // MOST))
        parts += [(head, group[i : i + size]) for i in range(0, len(group), size)]
    return parts


def _capacity(found: Mapping[str, Any], name: str) -> list[str]:
    """Both lengths by size, with the published laws in the same chart."""
    from statewright.studies import capacity_laws, capacity_table

    parts = [rows_table("", capacity_table.rows(found))]
    system = capacity_table.main_system(found)
    published = {"forget": capacity_laws.PUBLISHED_FORGET, "recall": capacity_laws.PUBLISHED_RECALL}
    drawn = []
    for kind, law in published.items():
        points = capacity_table.points(found, kind, system)
        ends = {"held at": "high", "failed at": "low"} if kind == "forget" else {"at least": "low"}
        series = [
            Series(f"{system}, {said}", _ends(points, end), scatter=True)
            for said, end in ends.items()
        ]
        xs = sorted({point.millions for point in points})
        grid = [xs[0] * (xs[-1] / xs[0]) ** (i / 24) for i in range(25)] if len(xs) > 1 else xs
        line = tuple((x, 1024 * law(x)) for x in grid if law(x) > 0)
        series.append(Series(f"published: {law} K", line))
        note = "Published for states of 0.8 to 19.3 million numbers."
        title = f"Tokens to {kind}, by numbers in the state"
        plot = Plot(
            title, "millions of numbers", "tokens", tuple(series), True, zero=True, note=note
        )
        drawn.append(draw(plot, f"{name}-{kind}"))
    said = [words(line) for line in capacity_table.said(found)]
    return [*parts, f'<div class="figures">{"".join(drawn)}</div>', *said]


def _equal_bytes(found: Mapping[str, Any], name: str) -> list[str]:
    from statewright.studies.equal_bytes_table import curves
    from statewright.studies.equal_bytes_table import table as of_study

    drawn = byte_curves([asdict(curve) for curve in curves(dict(found))], f"{name}-b")
    return [drawn, rows_table("", of_study(dict(found)))]


def _ends(points: Sequence[Any], end: str) -> tuple[tuple[float, float], ...]:
    values = ((p.millions, 1024 * getattr(p.interval, end)) for p in points)
    return tuple((x, y) for x, y in values if math.isfinite(y) and y > 0)


def _books(found: Mapping[str, Any], name: str) -> list[str]:
    """The tables of the paper as the study prints them, and perplexity over budgets."""
    from statewright.studies.books_table import TABLES

    parts = [_budgets(found["cells"], name)]
    for i, (title, make) in enumerate(TABLES.items()):
        if lines := make(found["cells"]):
            parts.append(section(f"{name}-t{i}", title, [_markdown(lines)], level=3))
    return parts


def _markdown(lines: Sequence[str]) -> str:
    """A table of the study's, which writes Markdown."""
    found = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in lines
        if line.startswith("|") and not set(line) <= set("|-: ")
    ]
    rest = [line for line in lines if line and not line.startswith("|")]
    return table("", found[0], found[1:]) + "".join(words(line, "soft") for line in rest)


def _budgets(cells: Cells, name: str) -> str:
    from statewright.studies.books import ROWS, mean_nats

    whole = {k.rpartition("/")[2]: r for k, r in cells.items() if k.startswith("moby/")}
    budgets = sorted({int(s.split("=")[1].split(":")[0]) for s in whole if "=" in s})
    series = []
    for row, spec in ROWS.items():
        points = [(float(k), whole.get(spec.format(k))) for k in budgets]
        pairs = tuple((k, math.exp(mean_nats(r))) for k, r in points if r)
        series.append(Series(row, pairs))
    if "none" in whole and budgets:
        level = math.exp(mean_nats(whole["none"]))
        series.append(Series("unbounded", tuple((float(k), level) for k in budgets)))
    plot = Plot(
        "Perplexity by budget", "tokens kept", "perplexity", tuple(series), True, True, log_y=True
    )
    return f'<div class="figures">{draw(plot, f"{name}-k")}</div>'
