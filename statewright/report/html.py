"""What pages are made of: the document, tables, sections; every text is escaped here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from statewright.report.style import STYLE

# Nothing may be fetched, whatever a file says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str, script: str = "") -> str:
    """A whole page: `body` is HTML, `title` is text. With a script, only what is inline runs."""
    guard = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n' if script else ""
    end = f"<script>\n{script}\n</script>\n" if script else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{guard}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n{end}</body>\n</html>\n"
    )


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], cells: str = ""
) -> str:
    """A table of texts that scrolls by itself; the first column names its row.

    cells: a class of the table.
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return scrolled(caption, f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>", cells)


def scrolled(caption: str, inner: str, kind: str = "") -> str:
    """A table's inside (HTML), focusable so that it can be scrolled with the keys."""
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = f' class="{kind}"' if kind else ""
    label = f' role="region" aria-label="{escape(caption)}"' if caption else ""
    return f'<div class="scroll" tabindex="0"{label}><table{kind}>{named}{inner}</table></div>'


def details(summary: str, inner: str) -> str:
    """Closed on a screen, open in print."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def section(number: str, title: str, parts: Sequence[str], level: int = 2) -> str:
    """parts: HTML. `number` must be the page's only one."""
    inner = "\n".join(part for part in parts if part)
    return (
        f'<section aria-labelledby="{number}"><h{level} id="{number}">{escape(title)}</h{level}>\n'
        f"{inner}\n</section>"
    )


def words(text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f"<p{kind}>{escape(text)}</p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Cards: a value and what it is."""
    items = "".join(f"<li><b>{escape(v)}</b><span>{escape(k)}</span></li>" for v, k in pairs)
    return f'<ul class="facts">{items}</ul>'


def embedded(name: str, value: Any) -> str:
    """JSON inside a page. No `<`, `>` or `&` in it, so that no text can end the script."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    for mark, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(mark, code)
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def number(value: Any) -> str:
    """A cell of a table: four digits that matter, whole numbers in full, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return f"{value:,.0f}"
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def size(count: float) -> str:
    """Bytes: 1,536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
