"""Tables at any width: whole names, whole numbers, no markup, nothing cut."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from statewright.cli.show import Column, console, counted, line_of, table

CLI = Path(__file__).parents[1] / "statewright" / "cli"
NAMES = ["window:budget=64:sinks=4", "a[/b]c", ":smile: [bold]x[/bold]", "変換器" * 6]
COLUMNS = ["policy", Column("loss", number=True), Column("note", words=True)]


def drawn(width: int) -> str:
    to = console(file=io.StringIO(), width=width)
    to.width = width
    rows = [(name, "1,234,567", "a note of several words") for name in NAMES]
    table(to, "a title [that] stays", COLUMNS, rows)
    return to.file.getvalue()


@pytest.mark.parametrize("width", [5, 20, 40, 60, 80, 200])
def test_names_and_numbers_are_whole_at_any_width(width: int) -> None:
    text = drawn(width)
    assert "a title [that] stays" in text and "…" not in text
    for name in NAMES:
        assert text.count(name) == 1
    assert text.count("1,234,567") == len(NAMES)
    assert " ".join(text.split()).count("several") == len(NAMES)


def test_a_table_that_fits_is_one_and_otherwise_every_cell_has_its_heading() -> None:
    wide, narrow = drawn(80).splitlines(), drawn(30).splitlines()
    assert wide[1].split() == ["policy", "loss", "note"] and len(wide) == 2 + len(NAMES)
    assert narrow[1] == NAMES[0] and narrow[2].split() == ["loss", "1,234,567"]


def test_every_console_is_made_in_one_place() -> None:
    """So that no name is ever taken for markup; quickstart prints what it made itself."""
    for path in CLI.glob("*.py"):
        source = path.read_text()
        if path.name != "show.py":
            assert "Console(" not in source and "rich.table" not in source, path


def test_words() -> None:
    assert [counted(n, "run") for n in (0, 1, 2, 1000)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "1,000 runs",
    ]
    event = {"key": "a/b", "loss": 1.23456, "by": {64: 0.5}, "list": [1, 2]}
    assert line_of(event) == "key a/b  loss 1.235  by 64:0.5  list 1, 2"
