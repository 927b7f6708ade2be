"""Recall at equal bytes: every family trained at the same measured size of its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from statewright.evaluation import evaluate_batch, footprint
from statewright.models import StatewrightForCausalLM
from statewright.models.resize import resize
from statewright.studies.cells import Cell
from statewright.studies.equal_bytes_model import (
    GROWN,
    LISTS,
    NAMES,
    Reached,
    build,
    config_of,
    solve,
)
from statewright.studies.equal_bytes_settings import TASKS, EqualBytesSettings
from statewright.studies.equal_bytes_table import table
from statewright.studies.experiment import Place, System
from statewright.studies.fit import HELD_OUT, Fit, accuracy, stacked, training_seed
from statewright.tasks import MQAR, Copying, SelectiveCopy

__all__ = ["DEFAULT", "NAME", "NOTE", "cells", "table"]
NAME = "equal-bytes"
DEFAULT = tuple(f"{name}/2" for name in NAMES)
NOTE = (
    "In brackets the measured bytes of state per sequence; -: out of reach, the reason is in the "
    "file. The Transformer is trained once without bounds, then bounded by every policy."
)
# Beyond every seed that chooses when a run may stop.
_FINAL = HELD_OUT + 2**40


def task_of(name: str, settings: EqualBytesSettings) -> Any:
    """A task on token ids; ValueError for an unknown one."""
    tasks: dict[str, Callable[[], Any]] = {
        "mqar": lambda: MQAR(settings.pairs, settings.length, settings.vocab, first=0),
        "copying": lambda: Copying(settings.copy_length, settings.copy_tokens),
        "selective-copy": lambda: SelectiveCopy(settings.copy_length, settings.copy_tokens),
    }
    if name not in tasks:
        raise ValueError(f"unknown task {name!r} (known: {', '.join(TASKS)})")
    return tasks[name]()


def cells(
    settings: EqualBytesSettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    tasks: Sequence[str] = ("mqar", "copying"),
) -> list[Cell]:
    """One per task, system, size and seed, e.g. `mqar/mingru/2/8192/seed0`.

    The Transformer's, `mqar/transformer/2/all/seed0`, holds every policy at every size. A size out
    of reach is a cell as well, with its reason.
    """
    made = []
    for name in tasks:
        task_of(name, settings).draw(1, 0)  # what cannot be drawn is refused before any training
        for text in chosen:
            system = System.parse(text, NAMES)
            sizes: Sequence[int] = (0,) if system.name == LISTS else settings.sizes
            for size in sizes:
                for seed in seeds:
                    key = f"{name}/{system}/{size or 'all'}/seed{seed}"
                    run = _Run(settings, name, system, size, seed, place, key)
                    made.append(Cell(key, run))
    return made


@dataclass(frozen=True)
class _Run:
    """One cell. size: bytes of state, 0 for the Transformer."""

    settings: EqualBytesSettings
    task: str
    system: System
    size: int
    seed: int
    place: Place
    key: str

    def __call__(self) -> dict[str, Any]:
        settings, name, layers = self.settings, self.system.name, self.system.layers
        vocab = task_of(self.task, settings).vocab
        about = {"chance": task_of(self.task, settings).chance}
        if name == LISTS:
            config = config_of(name, 0, layers, vocab, settings)
            model = build(config, self.seed, self.place.device)
            trained = self._fit(model, settings.num_steps, 0, self.key)
            return {**trained, **about, "points": self._bounded(model)}
        reached = solve(name, self.size, layers, vocab, settings)
        if isinstance(reached, str):
            return {**about, "points": [{"target": self.size, "unreachable": reached}]}
        model, trained = self._trained(reached)
        return {**trained, **about, "points": [{"target": self.size, **self._measure(model)}]}

    def _trained(self, reached: Reached) -> tuple[StatewrightForCausalLM, dict[str, Any]]:
        """A grown model spends half of its steps on a state smaller by `settings.grow`."""
        settings, name = self.settings, self.system.name
        if name not in GROWN:
            model = build(reached.config, self.seed, self.place.device)
            return model, self._fit(model, settings.num_steps, 0, self.key)
        half = max(1, settings.num_steps // 2)
        small = config_of(
            GROWN[name],
            reached.size // settings.grow,
            self.system.layers,
            reached.config.vocab_size,
            settings,
        )
        model = build(small, self.seed, self.place.device)
        before = self._fit(model, half, 0, f"{self.key}/before")
        grown = resize(model, key=settings.grow, layers="all", init="zero", seed=self.seed)
        rest = max(1, settings.num_steps - half)
        after = self._fit(grown, rest, half, f"{self.key}/after")
        kept = ("parameters", "steps", "accuracy")
        return grown, {**after, "before": {name: before[name] for name in kept}}

    def _fit(
        self, model: StatewrightForCausalLM, steps: int, first: int, key: str
    ) -> dict[str, Any]:
        """Train for `steps`; data begin at step `first`."""
        settings, task = self.settings, task_of(self.task, self.settings)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return stacked(task.draw(settings.batch_size, training_seed(self.seed, first + step)))

        return Fit(
            model,
            dataclasses.replace(settings, num_steps=steps),
            self.seed,
            batch,
            lambda m: accuracy(m, [task], settings.num_eval, settings.batch_size),
            self.place.snapshot(key),
            lambda point: self.place.listen({"key": key, **point}),
        ).train()

    def _measure(self, model: StatewrightForCausalLM, policy: str = "none") -> dict[str, Any]:
        """Accuracy on held-out data, and the bytes that a sequence's state really has."""
        task = task_of(self.task, self.settings)
        batch = task.draw(self.settings.num_eval, _FINAL)
        found = evaluate_batch(model.eval(), None, task, batch, policy, rows=0)
        assert found.cost is not None
        return {
            "policy": policy,
            "bytes": found.cost.state_bytes,
            "accuracy": found.metrics["accuracy"],
            "interval": found.interval,
        }

    def _bounded(self, model: StatewrightForCausalLM) -> list[dict[str, Any]]:
        """Without bounds, and under every policy at every size; convolutions' taps count too."""
        points = [{"target": None, **self._measure(model)}]
        beside = footprint(model.eval()).fixed
        for policy in self.settings.policies:
            for size in self.settings.sizes:
                bound = f"{policy}:budget={max(size - beside, 1)}B"
                try:
                    found = self._measure(model, bound)
                except ValueError as error:
                    found = {"unreachable": str(error)}
                points.append({"target": size, **found, "policy": policy})
        return points
