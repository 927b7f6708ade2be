"""What a verb shows: words and tables for people, or with --json one JSON value and nothing else.

Every console is made here, without markup and emoji, so that a name such as `a[/b]c` is printed as
it is; style comes from `rich.text.Text`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON value to stdout and nothing else."
)
# Columns of a file or a pipe, which nobody has made too narrow.
_WIDE = 200
_GAP = 2


def console(stderr: bool = False, **options: Any) -> Console:
    """A console that takes every string literally; $COLUMNS is its width where it is given."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDE
    return made


def emit(found: Any) -> None:
    """Print a JSON value to stdout; a number that JSON lacks becomes null."""
    click.echo(json.dumps(plain(found), indent=2, allow_nan=False))


def show(found: Any, as_json: bool, draw: Callable[[Console, Any], None]) -> None:
    """One of the two, and never both."""
    emit(found) if as_json else draw(console(), found)


def plain(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    return plain(value.item()) if hasattr(value, "item") else str(value)


@dataclasses.dataclass(frozen=True)
class Column:
    """A heading; numbers stand to the right, and only words may be broken, between them."""

    name: str
    number: bool = False
    words: bool = False


def table(
    to: Console, title: str, columns: Iterable[Column | str], rows: Iterable[Sequence[Any]]
) -> None:
    """Print rows of strings or Text under their headings; where they do not fit, a line per cell.

    No name and no number is ever cut or broken, at any width. A plain string is a column of names.
    """
    from rich.text import Text

    columns = [Column(c) if isinstance(c, str) else c for c in columns]
    rows = [tuple(row) for row in rows]
    if title:
        to.print(Text(title, style="italic"), soft_wrap=True)
    if _width(columns, rows) > to.width:
        _stacked(to, columns, rows)
        return
    to.print(grid(columns, rows))


def grid(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table:
    """The rows as rich draws them, for a console of this module."""
    from rich.table import Table

    drawn = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        justify = "right" if column.number else "left"
        drawn.add_column(column.name, justify=justify, no_wrap=not column.words)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _width(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> int:
    """The least that the table needs."""
    from rich.cells import cell_len

    need = 0
    for i, column in enumerate(columns):
        cells = [column.name, *(str(row[i]) for row in rows)]
        parts = [part for cell in cells for part in _unbroken(cell, column)]
        need += max(map(cell_len, parts), default=0) + _GAP
    return need


def _unbroken(cell: str, column: Column) -> list[str]:
    return cell.split() if column.words else cell.splitlines()


def _stacked(to: Console, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> None:
    """The first cell on a line of its own, the others below it, each with its heading."""
    from rich.cells import cell_len
    from rich.text import Text

    label = max((cell_len(column.name) for column in columns[1:]), default=0)
    for row in rows:
        to.print(Text(str(row[0]), style="bold"), soft_wrap=True)
        for column, cell in zip(columns[1:], row[1:]):
            if str(cell):
                # A cell's own lines are one here.
                said = cell if isinstance(cell, Text) else " ".join(cell.splitlines())
                to.print(Text(f"  {column.name:<{label}}  ").append(said), soft_wrap=True)


def line_of(event: Mapping[str, Any]) -> str:
    """An event on one line: names and values, floats to four digits."""
    return "  ".join(f"{name} {_shown(value)}" for name, value in event.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{_shown(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


def counted(number: int, word: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
