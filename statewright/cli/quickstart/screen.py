"""What the steps of quickstart print with: headings, sentences and tables, at any width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_INDENT = (0, 0, 0, 3)


class Screen:
    """A console; `step` numbers the headings and says how many seconds have passed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = time.perf_counter()
        self.number = 0

    def step(self, verb: str, what: str) -> None:
        self.number += 1
        passed = time.perf_counter() - self.began
        self.console.print(
            f"[bold]{self.number} {verb}[/bold]  {what}  [dim]({passed:.0f} s)[/dim]"
        )

    def say(self, words: str) -> None:
        """A sentence with markup, indented and wrapped."""
        self.console.print(Padding(Text.from_markup(words), _INDENT))

    def quote(self, text: str) -> None:
        """What a model wrote, as it is."""
        self.console.print(Padding(Text(" ".join(text.split()), style="italic cyan"), _INDENT))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Names left, numbers right; a name is never cut."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for i, name in enumerate(head):
            table.add_column(
                name,
                justify="left" if i == 0 else "right",
                overflow="fold",
                no_wrap=i == 0,
            )
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(Padding(table, _INDENT))
