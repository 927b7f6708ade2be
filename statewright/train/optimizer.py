"""Which weights are trained, and AdamW over them."""

from __future__ import annotations

import torch
from torch import nn

from statewright.train.config import TrainConfig

# Matrices by shape (Mamba's A_log) or not: what they hold are rates, steps and starting points.
_NEVER_DECAYED = {"A_log", "D", "dt_bias", "init_param"}


def choose_trained(model: nn.Module, train_only: str) -> None:
    """Freeze all but what is to be trained: `all`, `mixers`, `mixers:0,6` (of those layers).

    `state` freezes every weight. Raises ValueError for a layer that does not exist.
    """
    kind, _, numbers = train_only.partition(":")
    model.requires_grad_(kind == "all")
    if kind != "mixers":
        return
    mixers = [layer.mixer for layer in model.model.layers]
    chosen = [int(n) for n in numbers.split(",")] if numbers else range(len(mixers))
    for number in chosen:
        if number >= len(mixers):
            raise ValueError(
                f"train_only={train_only!r}: there is no layer {number}, expected 0 to "
                f"{len(mixers) - 1}"
            )
        mixers[number].requires_grad_(True)


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the weights that decay: matrices, but neither embeddings nor rates nor states."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and id(parameter) not in embeddings
        and name.rpartition(".")[2] not in _NEVER_DECAYED
        and not getattr(parameter, "_no_weight_decay", False)
    }


def make_optimizer(
    model: nn.Module, config: TrainConfig, initial: nn.Module | None = None
) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient, weight decay on matrices only (see decayed_names).

    `initial`: a learned state, never decayed.
    """
    names = decayed_names(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    learned = [] if initial is None else list(initial.parameters())
    groups = [
        {"params": [p for n, p in trained if n in names], "weight_decay": config.weight_decay},
        {"params": [*(p for n, p in trained if n not in names), *learned], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)
