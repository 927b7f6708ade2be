"""The results of `studies/books.py` as Markdown: what is there so far, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewright.evaluation import paired
from statewright.spec import split
from statewright.studies.books import FEW, ROWS, mean_nats

# arXiv:2401.06104, table 1: KV memory in GB, largest batch on one V100, relative throughput.
PAPER = {
    256: (0.15, 139, 8.5),
    512: (0.28, 70, 4.8),
    1024: (0.56, 35, 3.1),
    2048: (1.11, 17, 1.7),
    4096: (2.18, 8, 1.0),
}
_MIB = 2**20
Cells = Mapping[str, dict[str, Any]]


def markdown(found: Mapping[str, Any]) -> str:
    """Every table that has a cell, then how it was made."""
    cells, lines = found["cells"], []
    for title, make in TABLES.items():
        body = make(cells)
        if body:
            lines += [f"### {title}", "", *body, ""]
    about = found.get("about", {})
    if about:
        versions = ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items() if v)
        lines += [
            f"`{about.get('command')}` ({about.get('dtype')}, {about.get('threads')} thread(s), "
            f"{about.get('processor')}, {versions}, {about.get('date')})"
        ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, ruler, *rows)]


def _of(cells: Cells, table: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """(the key's parts after the table's name, result)."""
    for key, result in cells.items():
        head, *parts = key.split("/")
        if head == table:
            yield parts, result


def _label(spec: str) -> tuple[str, int]:
    """("TOVA-layer", 512) of "tova:budget=512"; budget 0 for "none"."""
    _, options = split(spec)
    budget = int(options.get("budget") or options.get("length") or 0)
    names = [name for name, row in ROWS.items() if row.format(budget) == spec]
    return (names[0] if names else spec), budget


def _perplexity(result: Mapping[str, Any]) -> str:
    return f"{math.exp(mean_nats(result)):.2f}"


def _single(cells: Cells) -> list[str]:
    found = {_label(parts[-1]): result for parts, result in _of(cells, "moby")}
    budgets = sorted({budget for _, budget in found if budget})
    full = found.get(("none", 0))
    rows = []
    for name in ROWS:
        values = [found.get((name, k)) for k in budgets]
        if any(values):
            shown = [_perplexity(v) if v else "" for v in values]
            rows.append([name, *shown, _perplexity(full) if full else ""])
    return _table(["perplexity", *map(str, budgets), "full"], rows) if rows else []


def _windows(cells: Cells) -> list[str]:
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for parts, result in _of(cells, "windows"):
        found.setdefault(_label(parts[-1]), {})[parts[0]] = result["nats"]
    full = found.pop(("none", 0), None)
    if full is None:
        return []
    rows = []
    for name, k in sorted(found, key=lambda label: (label[1], FEW.index(label[0]))):
        mine = found[name, k]
        against = [_against(mine, full), _against(mine, found.get((FEW[0], k), {}))]
        nats = [value for values in mine.values() for value in values]
        mean = math.exp(sum(nats) / len(nats))
        rows.append([f"{name}, {k}", f"{mean:.2f}", *against, str(len(nats))])
    nats = [value for values in full.values() for value in values]
    rows.append(["full", f"{math.exp(sum(nats) / len(nats)):.2f}", "", "", str(len(nats))])
    return _table(
        ["policy, budget", "perplexity", "nats over full", f"nats over {FEW[0]}", "windows"], rows
    )


def _against(mine: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> str:
    both = [book for book in mine if book in other]
    if not both or mine is other:
        return ""
    found = paired(*([v for book in both for v in run[book]] for run in (mine, other)))
    span = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{span}"


def _long(cells: Cells) -> list[str]:
    rows, width = [], 0
    for parts, result in _of(cells, "long"):
        pairs = [result["runs"][i : i + 2] for i in range(0, len(result["runs"]), 2)]
        values = [f"{math.exp(sum(p) / len(p)):.1f}" for p in pairs]
        width = max(width, len(values))
        name, budget = _label(parts[-1])
        rows.append([f"{name}, {budget}", parts[-2], *values, _perplexity(result)])
    head = ["policy", "positions", *(f"to {4 * (i + 1)}K" for i in range(width)), "all"]
    return _table(head, rows) if rows else []


def _survivors(cells: Cells) -> list[str]:
    rows = []
    for parts, result in _of(cells, "moby"):
        if "survivors" in result:
            name, budget = _label(parts[-1])
            s = result["survivors"]
            shares = [f"{s[n]:.3f}" for n in ("recent", "first", "next_3", "up_to_25")]
            rows.append((budget, [f"{name}, {budget}", *shares, f"{s['mean_age']:.0f}"]))
    rows = [row for _, row in sorted(rows, key=lambda row: row[0])]
    head = ["policy", "recent", "token 1 kept", "2-4 kept", "5-25 kept", "mean age"]
    return _table(head, rows) if rows else []


def _classes(cells: Cells) -> list[str]:
    found = {}
    for parts, result in _of(cells, "moby"):
        name, budget = _label(parts[-1])
        if name == "TOVA-layer" and "survivors" in result:
            found[budget] = result["survivors"]["survival"]
    found = dict(sorted(found.items()))
    names = {name for survival in found.values() for name in survival}
    if not names:
        return []

    def longest(name: str) -> float:
        return -max(s[name][1] for s in found.values() if name in s)

    rows = []
    for name in sorted(names, key=longest):
        values = [f"{s[name][1]:.0f}" if name in s else "" for s in found.values()]
        count = max(s[name][0] for s in found.values() if name in s)
        rows.append([name, str(count), *values])
    return _table(["class of token", "tokens", *map(str, found)], rows)


def _decode(cells: Cells) -> list[str]:
    for _, result in _of(cells, "decode"):
        (spec, bounded), (_, full) = result["points"].items()
        rows = []
        for (tokens, ms, held), (_, other_ms, other) in zip(bounded, full):
            sizes = [f"{held / _MIB:.1f}", f"{other / _MIB:.1f}"]
            rows.append([f"{tokens:,}", f"{ms:.1f}", f"{other_ms:.1f}", *sizes])
        head = ["tokens seen", f"ms, {spec}", "ms, full", "MiB", "MiB, full"]
        return _table(head, rows)
    return []


def _throughput(cells: Cells) -> list[str]:
    found = {int(parts[-1]): result for parts, result in _of(cells, "throughput")}
    full = found.get(max(found, default=0))
    rows = []
    for size, result in sorted(found.items()):
        speed = result["tokens_per_second"]
        calculated, held = (result[n] / _MIB for n in ("row_bytes", "held_bytes"))
        paper = PAPER.get(size)
        rows.append(
            [
                str(size),
                f"{calculated:.1f}",
                f"{held / result['batch']:.1f}",
                str(result["batch"]),
                f"{speed:.1f}",
                f"{speed / full['tokens_per_second']:.1f}",
                f"{paper[2]}" if paper else "",
            ]
        )
    head = ["size", "MiB a row", "measured", "batch", "tokens/s", "relative", "paper"]
    return _table(head, rows) if rows else []


TABLES = {
    "Perplexity of one window under every budget": _single,
    "Several windows of several books (paired differences, 95 % intervals)": _windows,
    "A long text: perplexity in runs of 4,096 tokens": _long,
    "Who survives (shares over layers and key heads)": _survivors,
    "How long a token survives under TOVA, in tokens, by budget": _classes,
    "Memory and time per token while generating": _decode,
    "State, largest batch in the same memory, and throughput": _throughput,
}
