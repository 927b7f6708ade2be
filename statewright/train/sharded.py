"""Checkpoints of sharded weights (torch.distributed.checkpoint), for any number of processes.

Every process writes its shards as safetensors; the weights are then merged on disk into the one
`model.safetensors` of a Hugging Face directory, the optimizer stays in shards. Nothing is pickled.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer"
_MERGED = "model-00001-of-00001.safetensors"


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give whole weights back: after a forward without a backward the model still has some."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_sharded(at: Path, model: nn.Module, entries: dict[str, Tensor]) -> None:
    """Weights and the optimizer's entries (by `kind:name`); called by every process."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    beside = at / "weights"
    writer = dcp.HuggingFaceStorageWriter(
        str(beside), save_distributed=True, enable_consolidation=True
    )
    dcp.save(weights, storage_writer=writer)
    # The format has no tensors without an axis.
    flat = {key: t.reshape(1) if t.dim() == 0 else t for key, t in entries.items()}
    if flat:
        writer = dcp.HuggingFaceStorageWriter(str(at / OPTIMIZER), save_distributed=True)
        dcp.save(flat, storage_writer=writer)
    if dist.get_rank() == 0:
        (beside / _MERGED).rename(at / WEIGHTS)
        shutil.rmtree(beside)


def load_weights(path: Path, model: nn.Module) -> None:
    """Every process reads its own part of `model.safetensors`."""
    _load(path, {name: p.detach() for name, p in model.named_parameters()})


def load_entries(path: Path, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's entries under `path`, sharded as the parameters are."""
    with _readable(path):
        found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    entries = {}
    for key in (key for key in found if ":" in key):
        kind, _, name = key.partition(":")
        if name not in named:
            raise ValueError(f"{path}: the optimizer holds an unknown parameter {name!r}")
        like = named[name].detach()
        entries[key] = torch.zeros(found[key].size) if kind == "step" else torch.zeros_like(like)
    _load(path, entries)
    return {k: t.reshape(()) if k.startswith("step:") else t for k, t in entries.items()}


def _load(path: Path, tensors: dict[str, Tensor]) -> None:
    with _readable(path), warnings.catch_warnings():
        # "Assuming the intent is to load in a single process": it is.
        warnings.simplefilter("ignore", UserWarning)
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: missing, damaged or of another model ({reason})") from error
