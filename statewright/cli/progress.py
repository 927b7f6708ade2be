"""Progress bars: for training, and for reading a long text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class TrainingBar:
    """Shows step, loss, tokens per second and the time left; call it with a run's events."""

    def __init__(self, console: Console, num_steps: int, done: int = 0) -> None:
        self.progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("held-out {task.fields[held_out]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(
            "train", total=num_steps, completed=done, loss="-", held_out="-", speed="-"
        )
        self.loss: float | None = None

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "held_out":
            self.progress.update(self.task, held_out=f"{event['nats']:.3f}")
            return
        loss = event["loss"]
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.progress.update(
            self.task,
            completed=event["step"],
            loss=f"{self.loss:.3f}",
            speed=f"{event['tokens_per_second']:,.0f}",
        )


@contextmanager
def reading_bar(console: Console, total: int | None) -> Iterator[Any]:
    """Yields `advance(num_bytes, tokens)` for a bar over the bytes of a text."""
    progress = Progress(
        TextColumn("[bold]read "),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = progress.add_task("read", total=total, tokens=0)

    def advance(num_bytes: int, tokens: int) -> None:
        progress.update(task, advance=num_bytes, tokens=tokens)

    with progress:
        yield advance
