"""Read the weights of a checkpoint directory, whatever its layout, without unpickling code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory: one file or shards, safetensors first.

    Raises ValueError, in one line, if there is no weights file or one is damaged or missing.
    """
    for name in _SINGLE[:1] + _INDEX[:1] + _SINGLE[1:] + _INDEX[1:]:
        file = path / name
        if not file.is_file():
            continue
        if not name.endswith(".json"):
            return _read_file(file)
        try:
            shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}: damaged ({error})") from error
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            tensors |= _read_file(path / shard)
        return tensors
    raise ValueError(f"{path}: no weights there (expected one of {', '.join(_SINGLE + _INDEX)})")


def fit(model: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load tensors into the model; ValueError names what is missing, unexpected or mis-shaped."""
    want = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(want.keys() - tensors.keys() - tied)
    unexpected = sorted(tensors.keys() - want.keys())
    if missing or unexpected:
        kind, names = ("missing", missing) if missing else ("unexpected", unexpected)
        raise ValueError(f"{where}: {len(names)} {kind} weights, e.g. {', '.join(names[:3])}")
    for name, tensor in tensors.items():
        if tensor.shape != want[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(want[name].shape)} "
                "from the config"
            )
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(f"{where}: weights of mixed dtypes ({names}); give dtype= to choose one")
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: a shard of the checkpoint is missing")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: damaged ({reason})") from error
