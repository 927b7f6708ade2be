"""What a run costs: tokens, seconds, bytes of state, peak memory; and where it ran."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from statewright.evaluation.decoding import held_bytes
from statewright.hf.arguments import cache_in
from statewright.hf.bounded import BoundedCache, BoundedLayer
from statewright.provenance import hardware, versions
from statewright.state import State

_SHORT, _LONG = 4, 8
_PACKAGES = (
    "statewright",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "rouge-score",
    "lm-eval",
)


@dataclass(frozen=True)
class Cost:
    """tokens: read and written, of all samples; state_bytes: the most that one sequence held after
    a call; peak_memory_bytes: on a GPU this run's, else the process's since it began."""

    tokens: int
    seconds: float
    tokens_per_second: float
    state_bytes: int
    peak_memory_bytes: int


class Meter:
    """Looks at every call of a model; `cost` adds up."""

    def __init__(self) -> None:
        self.tokens, self._most = 0, 0
        self._held: tuple[Any, int] | None = None
        self._began = time.perf_counter()

    def call(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return
        self.tokens += ids.numel()
        holder = getattr(output, "state", None)
        if holder is None and isinstance(output, ModelOutput):
            holder = cache_in(output)
        if holder is None:
            return
        self._held = (holder, ids.shape[0])
        if ids.shape[1] > 1:
            self.look()

    def look(self) -> None:
        """Measure what the last call left; single tokens are not measured one by one."""
        if self._held is None:
            return
        holder, rows = self._held
        self._most, self._held = max(self._most, _bytes(holder) // rows), None

    def cost(self, device: torch.device) -> Cost:
        self.look()
        seconds = time.perf_counter() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        return Cost(self.tokens, seconds, self.tokens / max(seconds, 1e-9), self._most, peak)


def _bytes(holder: Any) -> int:
    """Of a State or of our cache of lists what they hold; of others every storage, in full."""
    own = isinstance(holder, BoundedCache) and all(type(x) is BoundedLayer for x in holder.layers)
    return holder.nbytes if own or isinstance(holder, State) else held_bytes(holder)


@contextmanager
def metered(model: torch.nn.Module) -> Iterator[Meter]:
    """A Meter on all calls of the model inside the block."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter = Meter()
    handle = model.register_forward_hook(meter.call, with_kwargs=True)
    try:
        yield meter
    finally:
        handle.remove()


@dataclass(frozen=True)
class Footprint:
    """Measured bytes of one sequence's state: what is always there, and what each token adds."""

    fixed: int
    per_token: int


@torch.no_grad()
def footprint(model: Any) -> Footprint:
    """Of any causal LM, from its state after two short texts."""
    sizes = []
    for length in (_SHORT, _LONG):
        with metered(model) as meter:
            model(a_few_ids(model, length))
            sizes.append(meter.cost(model.device).state_bytes)
    per_token = (sizes[1] - sizes[0]) // (_LONG - _SHORT)
    return Footprint(sizes[0] - _SHORT * per_token, per_token)


def a_few_ids(model: Any, length: int) -> Tensor:
    """(1, length): ids that every model knows."""
    size = model.config.get_text_config().vocab_size
    return (torch.arange(length, device=model.device) % size).unsqueeze(0)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the git hash of the source tree if it has one, and the hardware."""
    return {
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "git": _git_hash(),
        "hardware": {
            "device": hardware(device.type),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def _git_hash() -> str | None:
    """`git describe` of the tree this package lies in: the hash, "-dirty" if it was changed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
