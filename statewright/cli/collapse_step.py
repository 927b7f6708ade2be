"""Quickstart's step on state collapse: a model that never learned to forget, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEPS, _RATE, _LENGTH, _SEARCHED = 80, 4e-3, 8192, 4097


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
    from statewright.diagnosis import diagnose
    from statewright.diagnosis.controls import Control, saved_control

    control = Control(num_steps=_STEPS, learning_rate=_RATE, seed=seed)
    began, tokens = time.perf_counter(), control.num_rows * control.train_length

    def listen(step: int, loss: float) -> None:
        speed = step * tokens / (time.perf_counter() - began)
        bar({"event": "step", "step": step, "loss": loss, "tokens_per_second": speed})

    path = directory / "collapsing"
    with TrainingBar(console, _STEPS) as bar:
        model = saved_control(control, corpus, path, listen)
    held = torch.from_numpy(rest.tokens[: _most(rest)].astype("int32")).unsqueeze(0)
    diagnosis = diagnose(model, held, control.train_length, name=str(path))
    _say(console, diagnosis)
    return Collapsed(model, path, held, diagnosis)


def _most(rest: Any) -> int:
    """Tokens that are diagnosed, so that as many are left to search on."""
    return min(_LENGTH + 1, rest.num_tokens // 2)


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


def cure(console: Any, sick: Collapsed, rest: Any) -> None:
    """Search policies on text that the diagnosis has not read, and print before and after on what
    it has: about 10 s on one core. The repaired model is written beside the sick one."""
    import torch

    from statewright.diagnosis.repair import repair

    begin = _most(rest)
    search = torch.from_numpy(rest.tokens[begin : begin + _SEARCHED].astype("int32")).unsqueeze(0)
    length = sick.diagnosis.text.reading.train_length
    found = repair(sick.model, search, sick.ids, length, ("forgetmore", "statewindow"))
    before, after = found.before.octaves[-1], found.after.octaves[-1]
    console.print(
        f"   {len(found.trials) - 1} policies tried: [bold]{found.policy}[/bold]\n"
        f"   nats per token after {before[0]:,} tokens: {before[1]:.2f} -> "
        f"[bold]{after[1]:.2f}[/bold], inside the training length {found.before.inside:.2f} -> "
        f"{found.after.inside:.2f}"
    )
    sick.model.config.policy = found.policy if found.succeeded else None
    sick.model.save_pretrained(sick.directory.with_name("repaired"))
