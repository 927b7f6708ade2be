"""The bytes of a state after any number of tokens, from a config alone.

No formula per family: the model is built without memory (torch's meta device), reads a few
tokens, and the tensors of its cache are measured; two lengths say what grows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from statewright.hf.bridge import kinds_of, read_state
from statewright.hf.host import RawModel
from statewright.policies import Eviction, build_policy
from statewright.state import KVState

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
    with torch.device("meta"), torch.no_grad():
        raw = RawModel(_without_memory(config, dtype))
        read = [raw(torch.zeros(batch, n, dtype=torch.int64)) for n in (_SHORT, _LONG)]
    if read[0][1] is None:
        raise ValueError(f"{raw.name} returns no cache: its state cannot be measured or passed")
    short, long = (
        read_state(cache, config, n).layers for (_, cache), n in zip(read, (_SHORT, _LONG))
    )
    windows = [getattr(layer, "sliding_window", None) for layer in _layers_of(read[0][1])]
    windows += [None] * (len(short) - len(windows))
    return [_layer(a, b, w) for a, b, w in zip(short, long, windows)]


def _without_memory(config: Any, dtype: torch.dtype | None) -> Any:
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    config = copy.deepcopy(config)
    # Some models look for this token among the ids, which have no values here.
    config.get_text_config(decoder=True).pad_token_id = None
    with torch.device("meta"):
        # The other implementations of experts look at values, which meta tensors do not have.
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="batched_mm"
        ).eval()


@dataclass(frozen=True)
class BoundedSize:
    """Bytes: of a model's weights, of one sequence's state under each policy, and without one."""

    weights: int
    full: int
    bounded: dict[str, int]

    def largest_batch(self, memory: int, policy: str | None = None) -> int:
        """Sequences whose states fit beside the weights; activations are not counted."""
        row = self.full if policy is None else self.bounded[policy]
        return max(memory - self.weights, 0) // row


def bounded_sizes(
    config: Any, policies: Sequence[str], context: int, dtype: torch.dtype | None = None
) -> BoundedSize:
    """What one sequence keeps once every budget is full, and after `context` tokens without one.

    The calculator of arXiv:2401.06104, table 1, from a transformers config alone. Counted as
    BoundedCache holds it: the budget and one slot more, in every key head, with keys, values,
    positions (8 bytes) and the policy's scores. Raises ValueError for a spec that is no eviction
    and a budget in bytes that is too small.
    """
    chosen = [(text, build_policy(text)) for text in policies]
    for text, policy in chosen:
        if not isinstance(policy, Eviction):
            raise ValueError(f"policy {text!r} does not bound keys and values")
    with torch.device("meta"), torch.no_grad():
        model = _without_memory(config, dtype)
        weights = sum(t.nbytes for t in model.parameters())
        _, cache = RawModel(model)(torch.zeros(1, _SHORT, dtype=torch.int64))
    layers = read_state(cache, config, _SHORT).layers
    parts = [p for layer in layers for p in (layer if isinstance(layer, tuple) else (layer,))]
    full = sum(sum(size.at(context).values()) for size in layer_sizes(config, 1, dtype))
    return BoundedSize(weights, full, {text: _bounded(parts, policy) for text, policy in chosen})


def _bounded(parts: Sequence[Any], policy: Eviction) -> int:
    lists = [part for part in parts if isinstance(part, KVState)]
    total = sum(part.nbytes for part in parts if not isinstance(part, KVState))
    for i, part in enumerate(lists):
        own = policy.for_layer(i, len(lists))
        slot = own.slot_bytes(part.k, part.v)
        own = own.in_tokens(slot)
        # `every` - 1 tokens may wait for their eviction, and the current one needs a slot.
        total += (own.budget + own.every) * slot + part.seen.nbytes
    return total


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
