"""The Chomsky hierarchy, appendix D of "Were RNNs All We Needed?" (arXiv:2410.01201, v3)."""

from __future__ import annotations

from collections.abc import Sequence

from statewright.studies.algorithmic import cells_of, table
from statewright.studies.cells import Cell
from statewright.studies.experiment import Place
from statewright.studies.settings import ChomskySettings
from statewright.tasks import CHOMSKY

NAME = "chomsky"
DEFAULT = ("mingru/2", "minlstm/2", "lstm/2")
__all__ = ["DEFAULT", "NAME", "cells", "make", "table"]


def make(task: str, low: int, high: int):
    """A task with words of `low` to `high` tokens; ValueError for an unknown name."""
    if task not in CHOMSKY:
        raise ValueError(f"unknown task {task!r} (known: {', '.join(CHOMSKY)})")
    return CHOMSKY[task](low, high)


def cells(
    settings: ChomskySettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    tasks: Sequence[str] = tuple(CHOMSKY),
) -> list[Cell]:
    """One per task, system and seed: Conv4 and mixer, no MLP (the paper's block for it)."""
    for task in tasks:
        make(task, 1, 1)
    block = {"conv_kernel": settings.conv_kernel, "mlp_ratio": 0.0}
    return cells_of(tasks, make, settings, chosen, seeds, place, block)
