"""Where a study's run stands: one safetensors file that is whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from statewright.state_file import write_tensors

_RUN, _MODEL, _OPTIMIZER = "run", "model.", "optimizer."


def save_snapshot(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Weights, the optimizer's numbers and a record for JSON; replaced, never half-written."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for parameter, entries in optimizer.state.items():
        for kind, value in entries.items():
            tensors[f"{_OPTIMIZER}{kind}:{names[parameter]}"] = value
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    write_tensors(path, tensors, {_RUN: json.dumps(record)})


def load_snapshot(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore both in place, exactly; the record, or None if there is no such file.

    Raises ValueError for a file that is damaged or of another model.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RUN])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = {
            name.removeprefix(_MODEL): tensor
            for name, tensor in tensors.items()
            if name.startswith(_MODEL)
        }
        model.load_state_dict(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not where this run stood ({error}); delete it to begin the run again"
        ) from error
    named = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith(_OPTIMIZER):
            kind, _, name = key.removeprefix(_OPTIMIZER).partition(":")
            on = tensor if kind == "step" else tensor.to(named[name].device)
            optimizer.state[named[name]][kind] = on
    return record
