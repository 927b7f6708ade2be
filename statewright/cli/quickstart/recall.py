"""Quickstart's step on larger states: what a GLA can look up, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statewright.cli.common import human_bytes
from statewright.cli.quickstart.screen import Screen
from statewright.studies.fit import Fit, accuracy, stacked, training_seed
from statewright.studies.settings import Settings
from statewright.tasks import MQAR

PAIRS, _VOCAB, _FIRST = (8, 15, 30), 64, 128
_STEPS, _ROWS, _TOKENS, _TESTED, _RATE = 240, 8, 120, 64, 1e-2


def tasks() -> list[MQAR]:
    """So many pairs, and then each key once more: which value was it?"""
    return [
        MQAR(pairs=pairs, length=4 * pairs, power=1.0, vocab=_VOCAB, first=_FIRST)
        for pairs in PAIRS
    ]


@dataclass
class _Further(Fit):
    """Warm-up, then a cosine to zero."""

    def rate(self, step: int) -> float:
        whole, warm = self.settings.num_steps, max(1, self.settings.num_steps // 20)
        falling = (1 + math.cos(math.pi * max(0, step - warm) / max(1, whole - warm))) / 2
        return self.settings.learning_rate * min((step + 1) / warm, falling)


def recall(screen: Screen, directory: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Train `demo:recall` on as it is, and with a state four times as large, for the same steps.

    Returns the shares of right answers by number of pairs, before and after. The expanded model
    is written to `expanded` in the directory. 240 steps of each for 60 seconds.
    """
    from statewright.demos import locate
    from statewright.models import load
    from statewright.models.resize import resize
    from statewright.models.tokenizers import byte_tokenizer

    small = load(locate("demo:recall"))
    large = resize(small, key=4.0, layers="all", init="zero", seed=seed)
    sizes = [model.init_state(1).nbytes for model in (small, large)]
    apart = _apart(small, large)
    screen.say(
        f"state {human_bytes(sizes[0])} -> {human_bytes(sizes[1])}, the same function at first: "
        f"logits differ by {apart:.1g}"
    )
    found: dict[str, Any] = {"before": _scores(small), "bytes": sizes, "apart": apart}
    steps = max(2, round(_STEPS * seconds / 60))
    settings = Settings(
        num_steps=steps, learning_rate=_RATE, weight_decay=0.1, eval_every=steps, save_every=steps
    )
    for name, model in (("same", small), ("expanded", large)):
        run = _Further(model, settings, seed, _batch(seed), _scores, directory / f"{name}.work")
        last = run.train()
        found[name] = {str(pairs): last[str(pairs)] for pairs in PAIRS}
    large.save_pretrained(directory / "expanded")
    byte_tokenizer().save_pretrained(directory / "expanded")
    found["steps"] = steps
    rows = [
        [label, *(f"{100 * found[key][str(pairs)]:.0f} %" for pairs in PAIRS)]
        for label, key in (
            ("before", "before"),
            (f"{steps} steps on, the same state", "same"),
            (f"{steps} steps on, four times the state", "expanded"),
        )
    ]
    screen.table(["right answers", *(f"{pairs} pairs" for pairs in PAIRS)], rows)
    return found


def _batch(seed: int) -> Any:
    """Each step one number of pairs, as many tokens whichever it is."""

    def draw(step: int) -> Any:
        task = tasks()[step % len(PAIRS)]
        return stacked(task.draw(_ROWS * _TOKENS // task.length, training_seed(seed, step)))

    return draw


def _scores(model: Any) -> dict[str, float]:
    return {f"{t.pairs}": accuracy(model, [t], _TESTED, _TESTED)["accuracy"] for t in tasks()}


def _apart(small: Any, large: Any) -> float:
    import torch

    ids, _ = stacked(tasks()[-1].draw(4, 1))
    with torch.no_grad():
        return float((large(ids).logits - small(ids).logits).abs().max())
