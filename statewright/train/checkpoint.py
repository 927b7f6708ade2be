"""Checkpoints that are whole or absent: written beside, synced, then renamed into place.

A checkpoint is a Hugging Face model directory plus the optimizer, the carried state and
`run.json`. All tensors are safetensors and all else is JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from statewright.state import State

RUN_FILE = "run.json"
_OPTIMIZER, _STATE = "optimizer.safetensors", "lanes.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_RECORD = {"config", "data", "seconds", "metrics_bytes"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a run stands: `step` steps done, and the record it keeps of itself."""

    path: Path
    step: int
    record: dict[str, Any]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimizer into place, exactly. ValueError if they do not fit."""
        weights = read_tensors(self.path / "model.safetensors")
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{self.path}: weights do not fit this model: {reason}") from error
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if set(missing) - tied or unexpected:
            odd = sorted((set(missing) - tied) | set(unexpected))
            raise ValueError(f"{self.path}: weights do not fit this model: {', '.join(odd[:5])}")
        named = dict(model.named_parameters())
        for key, tensor in read_tensors(self.path / _OPTIMIZER).items():
            kind, _, name = key.partition(":")
            if name not in named:
                raise ValueError(f"{self.path}: the optimizer holds an unknown parameter {name!r}")
            optimizer.state[named[name]][kind] = tensor

    def carried(self, like: State) -> State:
        """The lanes' state, in the structure of `like`."""
        return like.with_tensors(read_tensors(self.path / _STATE))


def save_checkpoint(
    directory: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    record: dict[str, Any],
    save_tokenizer: Callable[[Path], Any],
) -> Checkpoint:
    """Write `checkpoint-<step>`; a kill at any moment leaves it whole or absent."""
    path = directory / f"checkpoint-{step}"
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{kind}:{names[parameter]}": value
        for parameter, entries in optimizer.state.items()
        for kind, value in entries.items()
    }

    def write(at: Path) -> None:
        model.save_pretrained(at)
        save_tokenizer(at)
        save_file(_plain(tensors), at / _OPTIMIZER)
        save_file(_plain(dict(state.items())), at / _STATE)
        (at / RUN_FILE).write_text(json.dumps({"step": step, **record}, indent=2) + "\n")

    replace_directory(path, write)
    return Checkpoint(path, step, record)


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory, then put it at `path` in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        for file in beside.rglob("*"):
            sync(file)
        old = _hide(path) if path.exists() else None
        beside.rename(path)
        sync(path.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def publish(source: Path, directory: Path) -> None:
    """Put copies of the model's files beside the checkpoints, each replaced in one step."""
    skip = {RUN_FILE, _OPTIMIZER, _STATE}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in skip:
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
    for pattern in (".*.writing", ".checkpoint-*.deleting"):
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
