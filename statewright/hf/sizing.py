"""The bytes of a state after any number of tokens, from a config alone.

No formula per family: the model is built without memory (torch's meta device), reads a few
tokens, and the tensors of its cache are measured; two lengths say what grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from statewright.hf.bridge import kinds_of, read_state
from statewright.hf.host import RawModel

_SHORT, _LONG = 8, 12
_NEVER = 2**40


@dataclass(frozen=True)
class LayerSize:
    """One layer's bytes: `fixed`, and `per_token` up to `limit` tokens (None: without end)."""

    kind: str
    fixed: dict[str, int]
    per_token: dict[str, int]
    limit: int | None = None

    def at(self, context: int) -> dict[str, int]:
        """Bytes by kind (`bridge.kinds_of`) after `context` tokens."""
        kept = context if self.limit is None else min(context, self.limit)
        return {kind: self.fixed[kind] + self.per_token[kind] * kept for kind in self.fixed}


def layer_sizes(config: Any, batch: int, dtype: torch.dtype | None = None) -> list[LayerSize]:
    """What each layer of a transformers model of this config keeps for `batch` rows.

    dtype None is the config's. Our own bookkeeping (positions) is left out: the host's cache does
    not hold it. Raises ValueError for a model whose state cannot be had.
    """
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"), torch.no_grad():
        # The other implementations of experts look at values, which meta tensors do not have.
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="batched_mm"
        ).eval()
        raw = RawModel(model)
        read = [raw(torch.zeros(batch, n, dtype=torch.int64)) for n in (_SHORT, _LONG)]
    if read[0][1] is None:
        raise ValueError(f"{raw.name} returns no cache: its state cannot be measured or passed")
    short, long = (
        read_state(cache, config, n).layers for (_, cache), n in zip(read, (_SHORT, _LONG))
    )
    windows = [getattr(layer, "sliding_window", None) for layer in _layers_of(read[0][1])]
    windows += [None] * (len(short) - len(windows))
    return [_layer(a, b, w) for a, b, w in zip(short, long, windows)]


def own_layer_sizes(model: Any, batch: int) -> list[LayerSize]:
    """The same of our own model without its policy; its States hold positions, so they count."""
    with torch.no_grad():
        ids = torch.zeros(batch, _LONG, dtype=torch.int64, device=model.device)
        read = [model(ids[:, :n], policy="none").state.layers for n in (_SHORT, _LONG)]
    windows = [getattr(layer.mixer, "window", None) for layer in model.model.layers]
    return [_layer(a, b, w, True) for a, b, w in zip(*read, windows)]


def _layers_of(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", ()))


def _layer(short: Any, long: Any, window: int | None, positions: bool = False) -> LayerSize:
    before, after = _bytes(short, positions), _bytes(long, positions)
    if window is not None and window - 1 <= _LONG:
        # The window is full already, so the two lengths do not show what a token costs.
        return LayerSize(_name(short), after, dict.fromkeys(after, 0))
    per_token = {k: (after[k] - before[k]) // (_LONG - _SHORT) for k in before}
    fixed = {k: before[k] - per_token[k] * _SHORT for k in before}
    return LayerSize(_name(short), fixed, per_token, None if window is None else window - 1)


def _bytes(state: Any, positions: bool) -> dict[str, int]:
    kinds = ("kv", "recurrent", "conv", "other", "positions")
    found = dict.fromkeys(kinds if positions else kinds[:-1], 0)
    for part in state if isinstance(state, tuple) else (state,):
        for kind, count in kinds_of(part).items():
            if kind in found:
                found[kind] += count
    return found


def _name(state: Any) -> str:
    parts = state if isinstance(state, tuple) else (state,)
    return " + ".join(type(part).__name__ for part in parts)


def crossover(state_bytes: Callable[[int], int], per_token: int) -> int | None:
    """The first length at which `per_token` bytes a token outgrow `state_bytes`; None: never.

    `state_bytes` may grow too (a hybrid), but no faster with length than it began, or never more.
    """
    if per_token * _NEVER < state_bytes(_NEVER):
        return None
    low, high = 1, _NEVER
    while low < high:
        middle = (low + high) // 2
        if per_token * middle >= state_bytes(middle):
            high = middle
        else:
            low = middle + 1
    return low
