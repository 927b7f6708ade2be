"""Several processes on torch.distributed: who they are, how they share a step, how they fail.

| parallel  | a process has                                        | by            |
|-----------|------------------------------------------------------|---------------|
| `rows`    | some lanes and every weight                          | DDP           |
| `sharded` | some lanes and a shard of every weight               | FSDP2         |
| `context` | some tokens of every lane and every weight           | context_parallel.py |

Started by torchrun; gloo on CPUs, NCCL on GPUs. A lane's state lives where its lane is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from statewright.state import State

FAILURE = ".failure"


class TrainingStopped(Exception):
    """A loss that is not finite, or a process that failed; the message says what was kept."""


@dataclass(frozen=True)
class World:
    """The processes of a run; one of size 1 needs no torch.distributed at all."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def sum(self, number: float, device: torch.device) -> float:
        """The sum over all processes, the same bits on each."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def max(self, number: int, device: torch.device) -> int:
        """The largest of all processes."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest.item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, total: int, what: str) -> slice:
        """This process's part of `total`; ValueError if they do not divide it."""
        if total % self.size:
            raise ValueError(f"{self.size} processes do not divide {what}={total}")
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield World.current()
        return
    # A device's index is torchrun's to say, not ours to choose.
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Without a name: NCCL for tensors on GPUs and gloo for those on CPUs.
    dist.init_process_group(None if torch.cuda.is_available() else "gloo")
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    """FSDP2: every block and the model hold a shard of their weights between uses.

    No cast happens here (autocast computes in bfloat16): FSDP's own would round the states that
    are passed to forward, and A_log with the weights.
    """
    # fully_shard renames the class, and the config says which one it was.
    model.config.architectures = [type(model).__name__]
    for block in model.model.layers:
        block.init_state = _copying(block.init_state)
        fully_shard(block)
        for name in ("step", "init_state"):
            register_fsdp_forward_method(block, name)
    fully_shard(model)
    register_fsdp_forward_method(model, "step")


def _copying(init_state: Callable[[int], State]) -> Callable[[int], State]:
    """A learned initial state may be a view of weights that are given back after the call."""
    return lambda batch_size: init_state(batch_size).map(torch.clone)


def parallelize(objective: nn.Module, parallel: str, world: World) -> nn.Module:
    """What is called instead of the objective, so that gradients are averaged over processes."""
    if world.size == 1 or parallel == "sharded":
        return objective
    return DistributedDataParallel(objective)


def without_sync(wrapped: nn.Module, last: bool) -> Any:
    """Gradients are exchanged once per step, with the last of the accumulated parts."""
    return nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync()


def gradient_norm(parameters: list[nn.Parameter], largest: float) -> float:
    """Clip to `largest`; the norm before, over all shards."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


@contextmanager
def together(world: World, directory: Path) -> Iterator[None]:
    """A process that fails leaves its message for the others, which stop with it.

    They notice by a broken connection; the message lies in the run's directory.
    """
    note = directory / FAILURE
    if world.size > 1:
        if world.rank == 0:
            note.unlink(missing_ok=True)
        world.barrier()
    try:
        yield
    except RuntimeError as error:
        if world.size == 1:
            raise
        told = _message(note, patience=2.0)
        if told is None and not _is_of_a_connection(error):
            _leave(note, world, error)
            raise
        told = told or "another process died without a message"
        raise TrainingStopped(f"{told}; {_kept(directory)}") from error
    except Exception as error:
        # What stops every process alike is not one process's failure.
        if world.size > 1 and not isinstance(error, TrainingStopped):
            _leave(note, world, error)
        raise


def _leave(note: Path, world: World, error: Exception) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    beside = note.with_name(f"{note.name}-{world.rank}")
    try:
        beside.write_text(f"process {world.rank} of {world.size} failed: {text}")
        beside.rename(note)
    except OSError:
        # A full disk may be the very failure; the others then say less.
        beside.unlink(missing_ok=True)


def _message(note: Path, patience: float) -> str | None:
    deadline = time.monotonic() + patience
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return note.read_text() if note.exists() else None


def _is_of_a_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _kept(directory: Path) -> str:
    found = sorted(directory.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    return f"the last good checkpoint is {found[-1]}" if found else "nothing was saved"
