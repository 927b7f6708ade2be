"""Quickstart's expand step: four times the state, the same function, and then training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from statewright.cli.common import human_bytes

_TOKENS = 16_384


def expand(console: Any, run: Any, seconds: float) -> None:
    """Expand the run's model; train it and, as a control, a copy of it for the same steps.

    `run` is a finished Run; about `seconds` in all. The expanded model is written to `expanded`
    in the run's directory.
    """
    import torch

    from statewright.models.resize import resize
    from statewright.train.evaluate import held_out as score
    from statewright.train.loop import Run

    small = run.model.eval()
    large = resize(small, key=4.0, layers="all", init="zero", seed=run.config.seed)
    held_out = run.valid_corpus
    if held_out.num_tokens > 2 * _TOKENS:
        held_out, _ = held_out.split(1 - _TOKENS / held_out.num_tokens)
    ids = torch.from_numpy(held_out.tokens[:512].astype("int64")).unsqueeze(0)
    with torch.no_grad():
        apart = (large(ids).logits - small(ids).logits).abs().max().item()
    before, after = (model.init_state(1).nbytes for model in (small, large))
    console.print(
        f"   state {human_bytes(before)} -> {human_bytes(after)}, every word still the same: "
        f"logits differ by [bold]{apart:.1g}[/bold]"
    )
    steps = _steps(run, large.num_parameters() / small.num_parameters(), seconds)
    config = replace(
        run.config,
        num_steps=steps,
        learning_rate=run.config.learning_rate / 4,
        # A new optimizer's first steps are of full size whatever the gradient: warm up for long.
        num_warmup_steps=max(1, min(steps // 2, 20)),
        eval_every=steps,
        save_every=steps,
    )
    found = {"before": score(small, held_out, config.length).bits_per_byte}
    for name, model in (("control", copy.deepcopy(small)), ("expanded", large)):
        further = Run(
            model, run.tokenizer, run.train_corpus, held_out, config, run.directory / name
        )
        further.train()
        found[name] = further.valid.bits_per_byte
    console.print(
        f"   {steps} steps later: as it was {found['control']:.3f} bits per byte, expanded "
        f"[bold]{found['expanded']:.3f}[/bold] (both {found['before']:.3f} before)"
        + (" - too few steps to tell them apart: give more --seconds" if steps < 40 else "")
    )


def _steps(run: Any, larger: float, seconds: float) -> int:
    """Steps of both models that fit, by the speed of the run so far."""
    per_step = run.seconds / max(1, run.step) * (1 + larger)
    return max(4, min(400, int(0.8 * seconds / per_step)))
