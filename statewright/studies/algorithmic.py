"""Train on short words, test on long ones: what the Chomsky and the ListOps study share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from statewright.models import StatewrightForCausalLM
from statewright.studies.cells import Cell
from statewright.studies.experiment import Place, System, Systems, over_seeds
from statewright.studies.fit import Fit, accuracy, stacked, training_seed
from statewright.studies.settings import ChomskySettings

# Least and most tokens of the words in each part of the test; trained lengths are measured apart.
BANDS = ((41, 64), (65, 128), (129, 192), (193, 256))
# All rows of a draw have one length: small draws, so that many lengths take part.
_DRAW = 16
Tasks = Callable[[str, int, int], Any]


def systems(settings: ChomskySettings) -> Systems:
    """Every name with the block that the study's settings describe."""
    return {
        "mingru": {"mixer": f"mingru:expansion={settings.expansion}"},
        "minlstm": {"mixer": f"minlstm:expansion={settings.expansion}"},
        "lstm": {"mixer": f"lstm:expansion={settings.expansion}"},
        "gru": {"mixer": f"gru:expansion={settings.expansion}"},
        "mamba": {"mixer": "mamba"},
        "transformer": {"mixer": "attention", "conv_kernel": 0, "mlp_ratio": 4.0},
        "aaren": {"mixer": "aaren"},
        "s4": {"mixer": "s4"},
        "h3": {"mixer": "h3"},
        "hyena": {"mixer": "hyena:filter_length=256"},
    }


def measure(
    model: StatewrightForCausalLM, task: str, make: Tasks, settings: ChomskySettings, final: bool
) -> dict[str, Any]:
    """Accuracy within the trained lengths; at the end also in every band of longer ones."""

    def on(low: int, high: int) -> dict[str, float]:
        return accuracy(model, [make(task, low, high)], settings.num_eval, _DRAW)

    found: dict[str, Any] = on(1, settings.train_length)
    if final:
        found["bands"] = [
            {"low": low, "high": high, "accuracy": on(low, high)["accuracy"]} for low, high in BANDS
        ]
    return found


def cells_of(
    tasks: Sequence[str],
    make: Tasks,
    settings: ChomskySettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    block: dict[str, Any],
) -> list[Cell]:
    """One per task, system and seed, e.g. `even-pairs/mingru/2/seed0`."""
    known = systems(settings)

    def run(task: str, system: System, seed: int, key: str) -> dict[str, Any]:
        trained = make(task, 1, settings.train_length)
        model = system.build(
            known,
            seed,
            place.device,
            vocab_size=trained.vocab,
            hidden_size=settings.hidden_size,
            dropout=settings.dropout,
            **block,
        )

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return stacked(trained.draw(settings.batch_size, training_seed(seed, step)))

        fit = Fit(
            model,
            settings,
            seed,
            batch,
            lambda m: measure(m, task, make, settings, final=False),
            place.snapshot(key),
            lambda point: place.listen({"key": key, **point}),
        )
        result = fit.train()
        with fit.computing():
            final = measure(model, task, make, settings, final=True)
        return {**result, **final, "chance": trained.chance}

    parsed = [System.parse(name, known) for name in chosen]
    keyed = [(t, s, seed, f"{t}/{s}/seed{seed}") for t in tasks for s in parsed for seed in seeds]
    return [Cell(key, lambda t=t, s=s, n=n, key=key: run(t, s, n, key)) for t, s, n, key in keyed]


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per task and system: accuracy within the trained lengths, and in each band, over seeds."""
    cells = found["cells"]
    chance = over_seeds(cells, lambda r: r["chance"])
    inside = over_seeds(cells, lambda r: r["accuracy"])
    rows = []
    for name, values in inside.items():
        task, _, system = name.partition("/")
        row = {"task": task, "system": system, "seeds": len(values)}
        row["trained"] = f"{_mean(values):.2f}"
        for i, (low, high) in enumerate(BANDS):
            banded = over_seeds(cells, lambda r, i=i: r["bands"][i]["accuracy"])[name]
            row[f"{low}-{high}"] = f"{_mean(banded):.2f}"
        rows.append({**row, "chance": f"{chance[name][0]:.2f}"})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
