"""Progress of training and of reading a long text: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
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

# Of the moving average of the loss, and seconds between lines where there is no terminal.
_MEMORY, _SECONDS = 0.9, 10.0


class MovingAverage:
    """Exponential, corrected for its start: the mean of what came so far, the latest most.

    m_t = b m_{t-1} + (1 - b) x_t from m_0 = 0, divided by 1 - b^t (Adam, arXiv:1412.6980, sec. 3);
    without that the first value keeps the weight b^(t - 1) for ever.
    """

    def __init__(self, memory: float = _MEMORY) -> None:
        self.memory, self.total, self.weight = memory, 0.0, 0.0

    def add(self, value: float) -> float:
        """The average after one more value."""
        self.total = self.memory * self.total + (1 - self.memory) * value
        self.weight = self.memory * self.weight + (1 - self.memory)
        return self.total / self.weight


class TrainingBar:
    """Shows step, loss, tokens per second and the time left; call it with a run's events.

    A bar on a terminal. Elsewhere a line at the first and the last step, at every held-out loss,
    and every ten seconds between.
    """

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
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            "train", total=num_steps, completed=done, loss="-", held_out="-", speed="-"
        )
        self.console, self.num_steps, self.done = console, num_steps, done
        self.loss = MovingAverage()
        self.began = self.told = time.perf_counter()

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "held_out":
            held_out = f"{event['nats']:.3f}"
            self.progress.update(self.task, held_out=held_out)
            self._tell(f"step {event['step']:,} of {self.num_steps:,}  held-out {held_out}")
            return
        step, loss = event["step"], self.loss.add(event["loss"])
        speed = event["tokens_per_second"]
        self.progress.update(self.task, completed=step, loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        now = time.perf_counter()
        if step in (self.done + 1, self.num_steps) or now - self.told >= _SECONDS:
            self.told = now
            left = (now - self.began) / max(1, step - self.done) * (self.num_steps - step)
            self._tell(
                f"step {step:,} of {self.num_steps:,}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
                f"{_minutes(left)} left"
            )

    def _tell(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)


def _minutes(seconds: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
