"""Effective remembrance: how far back the next token's distribution depends on the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.runner import Runner
from statewright.policies import Policy


@dataclass(frozen=True)
class Remembrance:
    """distance: the mean total variation (0 to 1) between the distributions of the next token
    after the last `context` tokens alone and after all `whole` of them."""

    context: int
    whole: int
    distance: float


@torch.no_grad()
def remembrance(
    host: Any, windows: Tensor, policy: Policy | str | None = None
) -> tuple[Remembrance, ...]:
    """Forget the first t tokens of windows (rows, L) for contexts of 1, 2, 4, ... < L tokens.

    Ruiz and Gu, arXiv:2507.02782: a model that remembers differs while anything is cut off;
    one with amnesia is told the same by its last few tokens.
    """
    run, L = Runner(host, policy), windows.shape[1]
    whole = _next(run, windows)
    found = []
    for i in range(L.bit_length()):
        context = 2**i
        if context >= L:
            break
        distance = (_next(run, windows[:, L - context :]) - whole).abs().sum(-1) / 2
        found.append(Remembrance(context, L, float(distance.mean())))
    return tuple(found)


def memory(found: tuple[Remembrance, ...], share: float) -> int:
    """The fewest last tokens that decide the next one, up to a share of what one alone misses."""
    limit = share * found[0].distance
    return next((r.context for r in found if r.distance <= limit), found[0].whole)


def _next(run: Runner, windows: Tensor) -> Tensor:
    """The distribution of the token after each window: (rows, vocabulary)."""
    parts = windows.split(run.batch_of(windows.shape[1]))
    rows = [run(part).logits[:, -1].float().softmax(-1) for part in parts]
    return torch.cat(rows)
