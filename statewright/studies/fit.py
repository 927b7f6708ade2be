"""Train a model on a task whose every batch is a function of the step; resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.mingru import MinimalMixer
from statewright.models import StatewrightForCausalLM
from statewright.ops import state_dtype
from statewright.precision import device_of
from statewright.state import ModelState
from statewright.studies.experiment import Listener
from statewright.studies.settings import Settings
from statewright.studies.snapshot import load_snapshot, save_snapshot
from statewright.tasks.base import IGNORED, Batch, Task

# Seeds of held-out data lie above all seeds of training data.
HELD_OUT = 2**60


def training_seed(seed: int, step: int) -> int:
    """The seed of one step's data."""
    return (seed + 1) * 2**32 + step


def stacked(batch: Batch) -> tuple[Tensor, Tensor]:
    """ids and targets (n, T) of samples of one length."""
    return (
        torch.stack([s.input_ids for s in batch.samples]),
        torch.stack([s.targets for s in batch.samples]),
    )


def scored_logits(
    model: StatewrightForCausalLM, ids: Tensor, targets: Tensor, state: ModelState | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and targets of the tokens that are scored, (scored, vocabulary) and (scored,)."""
    device = model.device
    hidden = model.model(ids.to(device), state=state).last_hidden_state
    scored = (targets != IGNORED).to(device)
    logits = model.lm_head(hidden[scored])
    return logits.to(state_dtype(logits.dtype)), targets.to(device)[scored]


@torch.no_grad()
def accuracy(
    model: StatewrightForCausalLM, tasks: Sequence[Task], num: int, batch_size: int
) -> dict[str, float]:
    """Shares of right tokens and of samples with all of them right, over held-out draws."""
    model.eval()
    tokens = samples = num_tokens = 0
    draws = range(0, num, batch_size)
    for i, begin in enumerate(draws):
        count = min(batch_size, num - begin)
        ids, targets = stacked(tasks[i % len(tasks)].draw(count, HELD_OUT + i))
        logits, wanted = scored_logits(model, ids, targets)
        right = torch.ones_like(targets, dtype=torch.bool)
        right[targets != IGNORED] = (logits.argmax(-1) == wanted).cpu()
        tokens += int((right & (targets != IGNORED)).sum())
        num_tokens += int((targets != IGNORED).sum())
        samples += int(right.all(1).sum())
    return {"accuracy": tokens / num_tokens, "exact": samples / num}


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; decay on matrices only, and not on embeddings, states' parameters or minimal gates."""
    spared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    spared |= {id(m.in_proj.weight) for m in model.modules() if isinstance(m, MinimalMixer)}
    groups: list[dict] = [{"params": [], "weight_decay": settings.weight_decay}]
    groups.append({"params": [], "weight_decay": 0.0})
    for parameter in model.parameters():
        plain = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        groups[plain or id(parameter) in spared]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


@dataclass
class Fit:
    """One run: `train()` does its steps and returns the curve and the last measurement.

    batch(step) -> ids, targets (n, T); measure(model) -> numbers, every `eval_every` steps and at
    the end. Weights, data and dropout are functions of (seed, step), so a run that was
    interrupted goes on from its last snapshot, the file `work`, as if it had not been.
    """

    model: StatewrightForCausalLM
    settings: Settings
    seed: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    measure: Callable[[StatewrightForCausalLM], dict[str, float]]
    work: Path
    listen: Listener = lambda event: None

    def train(self) -> dict[str, Any]:
        settings, model = self.settings, self.model
        optimizer = make_optimizer(model, settings)
        step, curve, losses = self._resume(optimizer)
        finite = True
        while step < settings.num_steps and finite:
            losses.append(self._one_step(optimizer, step))
            step += 1
            finite = math.isfinite(losses[-1])
            if step % settings.eval_every == 0 or step == settings.num_steps or not finite:
                curve.append(self._point(step, losses))
                losses = []
                if self._is_over(curve):
                    break
            if step % settings.save_every == 0 and step < settings.num_steps:
                record = {"step": step, "curve": curve, "losses": losses}
                save_snapshot(self.work, model, optimizer, record)
        self.work.unlink(missing_ok=True)
        parameters = sum(p.numel() for p in model.parameters())
        result = {"parameters": parameters, "steps": step, "diverged": not finite}
        return {**result, **{k: v for k, v in curve[-1].items() if k != "step"}, "curve": curve}

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.settings.learning_rate

    def loss(self, step: int) -> Tensor:
        """The mean loss of a step's batch."""
        return F.cross_entropy(*scored_logits(self.model, *self.batch(step)))

    def _one_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + step)
            with self.computing():
                loss = self.loss(step)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _is_over(self, curve: list[dict[str, float]]) -> bool:
        """Whether the accuracy is reached, or the loss has not fallen for long enough."""
        if curve[-1].get("accuracy", 0.0) >= self.settings.stop_at:
            return True
        patience = getattr(self.settings, "patience", 0)
        if not patience or len(curve) <= patience:
            return False
        losses = [point["loss"] for point in curve]
        return min(losses[-patience:]) >= min(losses[:-patience])

    def _point(self, step: int, losses: list[float]) -> dict[str, float]:
        with self.computing():
            measured = self.measure(self.model)
        point = {"step": step, "train_loss": sum(losses) / len(losses), **measured}
        self.listen(point)
        return point

    def computing(self) -> torch.autocast:
        """Products in the settings' dtype, in training and in every measurement."""
        bfloat16 = self.settings.dtype == "bfloat16"
        device = device_of(self.model)
        return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    def _resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, list, list[float]]:
        found = load_snapshot(self.work, self.model, optimizer)
        return (0, [], []) if found is None else (found["step"], found["curve"], found["losses"])
