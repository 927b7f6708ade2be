"""ListOps from its grammar: short expressions to train on, longer ones to test."""

from __future__ import annotations

from collections.abc import Sequence

from statewright.studies.algorithmic import cells_of, table
from statewright.studies.cells import Cell
from statewright.studies.experiment import Place
from statewright.studies.settings import ListOpsSettings
from statewright.tasks import ListOps

NAME = "listops"
DEFAULT = ("mingru/4", "minlstm/4", "lstm/4", "transformer/4")
__all__ = ["DEFAULT", "NAME", "cells", "make", "table"]


def make(task: str, low: int, high: int) -> ListOps:
    return ListOps(max(low, 4), high)


def cells(
    settings: ListOpsSettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
) -> list[Cell]:
    """One per system and seed: Conv4, mixer and MLP (the paper's block for long-range tasks)."""
    block = {"conv_kernel": settings.conv_kernel, "mlp_ratio": settings.mlp_ratio}
    return cells_of([NAME], make, settings, chosen, seeds, place, block)
