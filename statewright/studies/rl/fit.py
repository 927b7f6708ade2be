"""Train a decision model on windows of a recording; resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statewright.studies.fit import Fit
from statewright.studies.rl.episodes import Windows
from statewright.studies.rl.settings import DecisionSettings


def loss_of(model: nn.Module, windows: Windows) -> Tensor:
    """Mean squared error of the actions, over all steps and action dimensions."""
    windows = windows.to(model.mean.device)
    actions, _ = model(windows)
    return (actions - windows.actions.to(actions)).square().mean()


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Windows]) -> dict[str, float]:
    model.eval()
    losses = [loss_of(model, windows).item() for windows in batches]
    return {"loss": sum(losses) / len(losses)}


@dataclass
class DecisionFit(Fit):
    """As `Fit`, on windows: `batch(step)` gives them, and the learning rate rises linearly."""

    batch: Callable[[int], Windows]

    def _one_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        settings = self.settings
        assert isinstance(settings, DecisionSettings)
        self.model.train()
        share = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + step)
            loss = loss_of(self.model, self.batch(step))
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
