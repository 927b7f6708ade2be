"""State passing over passkeys: the last segment of a long text, after the state of what precedes.

Gradients are cut where the segment begins (arXiv:2507.02782; truncated backpropagation). Every
step reads its texts from their beginning with the weights of that step, so nothing is carried from
step to step and a step is a function of its number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.studies.capacity_settings import CapacitySettings
from statewright.studies.fit import Fit, scored_logits
from statewright.train.config import TrainConfig


def schedule(settings: CapacitySettings) -> TrainConfig:
    """The learning rate of a step: a warm-up, then a cosine."""
    return TrainConfig(
        num_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        num_warmup_steps=min(settings.num_warmup_steps, settings.num_steps // 4),
        final_rate=settings.final_rate,
    )


class PassingFit(Fit):
    """A Fit on (read, ids, targets): `read` (n, S) without gradient, then ids and targets (n, T).

    A Transformer's keys and values are passed on as its state.
    """

    texts: Callable[[int], tuple[Tensor, Tensor, Tensor]]

    def rate(self, step: int) -> float:
        return schedule(self.settings).rate(step)

    def loss(self, step: int) -> Tensor:
        read, ids, targets = (part.to(self.model.device) for part in self.texts(step))
        state = None
        if read.shape[1]:
            with torch.no_grad():
                state = self.model(read, logits_to_keep=1).state.detach()
        return F.cross_entropy(*scored_logits(self.model, ids, targets, state))


def passing_settings(settings: CapacitySettings) -> Any:
    """Those of the second training: its steps and its rate in place of the first's."""
    from dataclasses import replace

    return replace(
        settings,
        num_steps=settings.passing_steps,
        learning_rate=settings.passing_rate or settings.learning_rate,
    )
