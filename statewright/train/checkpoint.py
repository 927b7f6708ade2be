"""Checkpoints that are whole or absent: written beside, synced, then renamed into place.

A checkpoint is a Hugging Face model directory plus the optimizer, the carried state (a file per
process) and `run.json`. All tensors are safetensors and all else is JSON: nothing is unpickled.
Any number of processes can resume it, whatever number wrote it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from statewright.models.shim import write_shim
from statewright.state import State
from statewright.state_file import read_state_file, save_state
from statewright.train import sharded
from statewright.train.distributed import World
from statewright.train.passing import LearnedState, join_rows

RUN_FILE, INITIAL = "run.json", "initial.state"
_OPTIMIZER, _STATE = "optimizer.safetensors", "lanes.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_RECORD = {"config", "data", "seconds", "metrics_bytes"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a run stands: `step` steps done, and the record it keeps of itself."""

    path: Path
    step: int
    record: dict[str, Any]

    def restore(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        initial: LearnedState | None = None,
    ) -> None:
        """Load weights and optimizer into place, exactly. ValueError if they do not fit."""
        named = named_parameters(model, initial)
        if sharded.is_sharded(model):
            sharded.load_weights(self.path, model)
        else:
            self._restore_weights(model)
        if initial is not None:
            initial.load(read_state_file(self.path / INITIAL).state)
        for key, tensor in self._entries(model, named).items():
            kind, _, name = key.partition(":")
            if name not in named:
                raise ValueError(f"{self.path}: the optimizer holds an unknown parameter {name!r}")
            # AdamW counts its steps on the CPU, wherever the weights are.
            place = "cpu" if kind == "step" else named[name].device
            optimizer.state[named[name]][kind] = tensor.to(place)

    def _restore_weights(self, model: torch.nn.Module) -> None:
        weights = read_tensors(self.path / sharded.WEIGHTS)
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{self.path}: weights do not fit this model: {reason}") from error
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if set(missing) - tied or unexpected:
            odd = sorted((set(missing) - tied) | set(unexpected))
            raise ValueError(f"{self.path}: weights do not fit this model: {', '.join(odd[:5])}")

    def _entries(
        self, model: torch.nn.Module, named: dict[str, torch.nn.Parameter]
    ) -> dict[str, Tensor]:
        in_shards = (self.path / sharded.OPTIMIZER).is_dir()
        if in_shards or sharded.is_sharded(model):
            at = self.path / sharded.OPTIMIZER if in_shards else self.path
            return sharded.load_entries(at, named)
        return read_tensors(self.path / _OPTIMIZER)

    def carried(self, like: State, rows: slice = slice(None)) -> State:
        """Some rows of the lanes' state, which must be of the kind of `like`."""
        files = [self.path / _STATE]
        if not files[0].exists():
            files = sorted(self.path.glob("lanes-*.state")) or files
        state = join_rows([read_state_file(file).state for file in files])
        if not {n for n, _ in like.items()} <= {n for n, _ in state.items()}:
            raise ValueError(f"{self.path}: {files[0].name} is the state of another model")
        return state.rows(rows).to(like.seen.device)


def named_parameters(
    model: torch.nn.Module, initial: LearnedState | None = None
) -> dict[str, torch.nn.Parameter]:
    """Everything a run may train, by the name it has in a checkpoint."""
    named = dict(model.named_parameters())
    if initial is not None:
        named |= {f"initial.{name}": value for name, value in initial.named_parameters()}
    return named


@dataclass(frozen=True, eq=False)
class Holder:
    """What a checkpoint is made of, on each of the processes that write it.

    replicated: every process holds the state of every lane.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    initial: LearnedState | None
    save_tokenizer: Callable[[Path], Any]
    world: World
    replicated: bool = False

    def write(self, at: Path, state: State, record: dict[str, Any]) -> None:
        """Fill a directory; every process calls it, and most is the first one's to do."""
        sharded.reshard(self.model)
        first, in_shards = self.world.rank == 0, sharded.is_sharded(self.model)
        names = {p: n for n, p in named_parameters(self.model, self.initial).items()}
        entries = {
            f"{kind}:{names[parameter]}": value
            for parameter, values in self.optimizer.state.items()
            for kind, value in values.items()
        }
        if in_shards:
            sharded.save_sharded(at, self.model, entries)
        if self.replicated or self.world.size == 1:
            if first:
                save_state(state, at / _STATE)
        else:
            save_state(state, at / f"lanes-{self.world.rank:05}-of-{self.world.size:05}.state")
        if not first:
            return
        if in_shards:
            self.model.config.save_pretrained(at)
            self.model.generation_config.save_pretrained(at)
            write_shim(at)
        else:
            self.model.save_pretrained(at)
            save_file(_plain(entries), at / _OPTIMIZER)
        self.save_tokenizer(at)
        if self.initial is not None:
            save_state(self.initial.state().detach(), at / INITIAL, self.model)
        (at / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def save_checkpoint(
    directory: Path, step: int, holder: Holder, state: State, record: dict[str, Any]
) -> Checkpoint:
    """Write `checkpoint-<step>`; a kill at any moment leaves it whole or absent."""
    path, record = directory / f"checkpoint-{step}", {"step": step, **record}
    if holder.world.size == 1:
        replace_directory(path, lambda at: holder.write(at, state, record))
        return Checkpoint(path, step, record)
    beside = path.with_name(f".{path.name}.parts")
    if holder.world.rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    holder.world.barrier()
    with _writing(path):
        holder.write(beside, state, record)
    holder.world.barrier()
    if holder.world.rank == 0:
        _put(beside, path)
    holder.world.barrier()
    return Checkpoint(path, step, record)


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory, then put it at `path` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with _writing(path):
            write(beside)
        _put(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk is an OSError, also where safetensors has an error of its own for it."""
    try:
        yield
    except SafetensorError as error:
        reason = f"{path}: not written ({error}); what was complete before is as it was"
        raise OSError(reason) from error


def _put(beside: Path, path: Path) -> None:
    """Everything on the disk, then one rename."""
    for file in beside.rglob("*"):
        sync(file)
    old = _hide(path) if path.exists() else None
    beside.rename(path)
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old)


def publish(source: Path, directory: Path) -> None:
    """Put copies of the model's files beside the checkpoints, each replaced in one step."""
    skip = {RUN_FILE, _OPTIMIZER, _STATE}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in skip and not file.match("lanes-*.state"):
            beside = directory / f".{file.name}.writing"
            shutil.copyfile(file, beside)
            sync(beside)
            beside.replace(directory / file.name)
    sync(directory)


def checkpoints(directory: str | Path) -> list[Checkpoint]:
    """The complete checkpoints under a directory, oldest first."""
    found = []
    for path in Path(directory).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / RUN_FILE).is_file():
            found.append(Checkpoint(path, int(match[1]), _read_record(path / RUN_FILE)))
    return sorted(found, key=lambda c: c.step)


def rotate(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed save left behind."""
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(_hide(old.path))
    for pattern in (".*.writing", ".checkpoint-*.parts", ".checkpoint-*.deleting"):
        for left in directory.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _hide(path: Path) -> Path:
    """Out of sight before deleting: a half-deleted directory must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if not isinstance(record, dict) or not record.keys() >= _RECORD:
        raise ValueError(f"{path}: damaged (not the record of a run)")
    return record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """As safetensors' load_file, with one clear ValueError for a missing or damaged file."""
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
