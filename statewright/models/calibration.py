"""What a policy measured on a model: head norms at the training length, in policy.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from statewright.policies.recurrent import carried
from statewright.state_file import write_tensors

FILE = "policy.safetensors"
Norms = tuple[Tensor, ...]

_WHERE = {
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token"),
}
# A checkpoint without norms is whole; a policy that needs them says that they are missing.
_OPTIONAL = dict.fromkeys(
    (
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
        "_raise_exceptions_for_gated_repo",
    ),
    False,
)


@torch.no_grad()
def measure_norms(model: nn.Module, ids: Tensor) -> Norms:
    """Frobenius norm of each head's state after ids (B, T), mean over rows, in float32.

    One tensor per layer with a linear recurrence: (H,), or (1,) for a vector state. The limits
    of `StateNorm(limit="1x")`, with T the training length. Without any policy.
    """
    state = model(ids, policy="none", logits_to_keep=1).state
    norms = []
    for block, layer in zip(model.model.layers, state.layers):
        if block.mixer.is_linear:
            value = carried(layer).float()
            heads = value.unsqueeze(1) if value.dim() == 2 else value.flatten(2)
            norms.append(heads.norm(dim=-1).mean(0))
    if not norms:
        raise ValueError("measure_norms: no layer of this model is a linear recurrence")
    return tuple(norms)


def calibrate(model: nn.Module, ids: Tensor) -> Norms:
    """Measure the norms on ids (B, T = training length) and keep them with the model.

    `save_pretrained` writes them to policy.safetensors; `load` and `from_pretrained` read them.
    """
    model.model.norms = measure_norms(model, ids)
    return model.model.norms


def write_norms(norms: Norms | None, directory: str | Path) -> None:
    """policy.safetensors beside the weights, if there is something to write."""
    if norms is not None:
        tensors = {f"norm.{i}": norm.contiguous() for i, norm in enumerate(norms)}
        write_tensors(Path(directory) / FILE, tensors, {"format": "pt"})


def read_norms(where: str | Path, **loading: Any) -> Norms | None:
    """What `write_norms` wrote, in a directory or on the hub; None if there is no such file.

    loading: `from_pretrained`'s keywords; those that say where its files are (subfolder,
    revision, cache_dir, ...) are followed. ValueError for a damaged file.
    """
    file = cached_file(where, FILE, **_OPTIONAL, **{k: loading[k] for k in _WHERE & loading.keys()})
    if file is None:
        return None
    try:
        tensors = load_file(file)
        return tuple(tensors[f"norm.{i}"] for i in range(len(tensors)))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file}: damaged ({error})") from error
