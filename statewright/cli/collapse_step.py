"""Quickstart's step on state collapse: a model that never learned to forget, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEPS, _RATE, _LENGTH = 80, 4e-3, 8192


@dataclass(frozen=True, eq=False)
class Collapsed:
    """The model that was trained, where it lies, what it read (1, N) and the diagnosis."""

    model: Any
    directory: Path
    ids: Any
    diagnosis: Any


def collapse(console: Any, corpus: Any, rest: Any, directory: Path, seed: int = 0) -> Collapsed:
    """Train a low-decay Mamba-2 on texts of 64 tokens of `corpus` (bytes), let it read up to 8,192
    tokens of the corpus `rest`, and print the verdict: about 20 s on one core."""
    import time

    import torch

    from statewright.cli.progress import TrainingBar
    from statewright.diagnose import diagnose
    from statewright.diagnose.controls import Control, saved_control

    control = Control(num_steps=_STEPS, learning_rate=_RATE, seed=seed)
    began, tokens = time.perf_counter(), control.num_rows * control.train_length

    def listen(step: int, loss: float) -> None:
        speed = step * tokens / (time.perf_counter() - began)
        bar({"event": "step", "step": step, "loss": loss, "tokens_per_second": speed})

    path = directory / "collapsing"
    with TrainingBar(console, _STEPS) as bar:
        model = saved_control(control, corpus, path, listen)
    held = torch.from_numpy(rest.tokens[: _LENGTH + 1].astype("int32")).unsqueeze(0)
    diagnosis = diagnose(model, held, control.train_length, name=str(path))
    _say(console, diagnosis)
    return Collapsed(model, path, held, diagnosis)


def _say(console: Any, diagnosis: Any) -> None:
    from rich.padding import Padding
    from rich.text import Text

    reading, verdict = diagnosis.text.reading, diagnosis.verdict
    losses = [f"{reading.in_window:.2f} up to {reading.train_length}"]
    losses += [f"{b.nats:.2f} to {b.end:,}" for b in reading.buckets[:0:-2][::-1]]
    style = "green" if verdict.cause is None else "bold red"
    console.print(f"   nats per token: {', '.join(losses)}")
    console.print(Padding(Text(verdict.name, style=style), (0, 3)))
    console.print(Padding(Text(diagnosis.text.words), (0, 3)))
