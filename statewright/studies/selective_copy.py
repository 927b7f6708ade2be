"""Selective copying: tables 1 and 2 of "Were RNNs All We Needed?" (arXiv:2410.01201)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from statewright.intervals import estimate
from statewright.studies.cells import Cell
from statewright.studies.experiment import (
    Place,
    System,
    Systems,
    over_seeds,
    over_seeds_shown,
)
from statewright.studies.fit import Fit, accuracy, stacked, training_seed
from statewright.studies.settings import SelectiveCopySettings
from statewright.tasks import SelectiveCopy

NAME = "selective-copy"
DEFAULT = (
    *(f"{name}/{layers}" for layers in (1, 2, 3) for name in ("mingru", "minlstm")),
    *(f"{name}/3" for name in ("mamba", "s4", "h3", "hyena")),
)
# Accuracy in percent at the paper's size: tables 1 and 2, the last four quoted there from Mamba's
# paper (two layers).
PAPER = {
    "mingru/3": 99.5,
    "minlstm/3": 96.0,
    "mamba/3": 99.8,
    "s4/3": 18.3,
    "h3/3": 57.0,
    "hyena/3": 30.1,
}


def systems(settings: SelectiveCopySettings) -> Systems:
    """Residual blocks of norm and mixer, without convolution or MLP, as the paper's.

    The baselines have their own papers' sizes; only attention and the nonlinear cells of the
    comparison get the MLP that they are used with.
    """
    minimal = f"expansion={settings.expansion}"
    total = settings.length + settings.tokens
    return {
        "mingru": {"mixer": f"mingru:{minimal}"},
        "minlstm": {"mixer": f"minlstm:{minimal}"},
        "mamba": {"mixer": "mamba"},
        "s4": {"mixer": "s4"},
        "s4d": {"mixer": "s4d"},
        "h3": {"mixer": "h3"},
        "hyena": {"mixer": f"hyena:filter_length={total}"},
        "aaren": {"mixer": "aaren"},
        "gru": {"mixer": "gru"},
        "lstm": {"mixer": "lstm"},
        "transformer": {"mixer": "attention", "mlp_ratio": 4.0},
    }


def cells(
    settings: SelectiveCopySettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
) -> list[Cell]:
    """One per system and seed, e.g. `mingru/3/seed0`."""
    known = systems(settings)
    task = SelectiveCopy(settings.length, settings.tokens)

    def run(system: System, seed: int, key: str) -> dict[str, Any]:
        model = system.build(
            known,
            seed,
            place.device,
            vocab_size=task.vocab,
            hidden_size=settings.hidden_size,
            dropout=settings.dropout,
            conv_kernel=0,
            mlp_ratio=0.0,
        )

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return stacked(task.draw(settings.batch_size, training_seed(seed, step)))

        return Fit(
            model,
            settings,
            seed,
            batch,
            lambda m: accuracy(m, [task], settings.num_eval, settings.batch_size),
            place.snapshot(key),
            lambda point: place.listen({"key": key, **point}),
        ).train()

    parsed = [System.parse(text, known) for text in chosen]
    keyed = [(s, seed, f"{s}/seed{seed}") for s in parsed for seed in seeds]
    return [Cell(key, lambda s=s, n=n, key=key: run(s, n, key)) for s, n, key in keyed]


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per system: mean and deviation of the accuracies over seeds, in percent, and the paper's."""
    exact = over_seeds(found["cells"], lambda r: 100 * r["exact"])
    rows = []
    for name, values in over_seeds(found["cells"], lambda r: 100 * r["accuracy"]).items():
        rows.append(
            {
                "system": name,
                "seeds": len(values),
                "accuracy %": over_seeds_shown(values),
                "all right %": f"{estimate(exact[name]).mean:.1f}",
                "paper %": PAPER.get(name, ""),
            }
        )
    return rows
