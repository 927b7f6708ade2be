"""Train a decision model on windows of a recording; resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statewright.ops import state_dtype
from statewright.studies.fit import Fit
from statewright.studies.rl.episodes import Windows
from statewright.studies.rl.settings import DecisionSettings


def loss_of(model: nn.Module, windows: Windows) -> Tensor:
    """Mean squared error of the actions, over all steps and action dimensions."""
    windows = windows.to(model.mean.device)
    actions, _ = model(windows)
    actions = actions.to(state_dtype(actions.dtype))
    return (actions - windows.actions.to(actions)).square().mean()


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Windows]) -> dict[str, float]:
    model.eval()
    losses = [loss_of(model, windows).item() for windows in batches]
    return {"loss": sum(losses) / len(losses)}


@dataclass
class DecisionFit(Fit):
    """As `Fit`, on windows: `batch(step)` gives them, and the learning rate rises linearly."""

    settings: DecisionSettings
    batch: Callable[[int], Windows]

    def rate(self, step: int) -> float:
        warmup = self.settings.warmup
        return self.settings.learning_rate * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

    def loss(self, step: int) -> Tensor:
        return loss_of(self.model, self.batch(step))
