"""What a list of keys and values holds, whatever the order of its slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from statewright.policies.base import MARK, Eviction
from statewright.state import KVState, ModelState, State


def canonical(state: State) -> State:
    """The same state with every list in the order of positions and no empty slot to spare.

    Slots are unordered and `pos` is the truth, so this is what two lists are compared by.
    """
    if isinstance(state, ModelState):
        return replace(state, layers=tuple(map(_canonical_layer, state.layers)))
    return _canonical_layer(state)


def _canonical_layer(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(map(_canonical_layer, state))
    if not isinstance(state, KVState):
        return state
    filled = state.pos >= 0
    last = torch.iinfo(torch.int64).max
    order = state.pos.masked_fill(~filled, last).argsort(dim=-1, stable=True)
    order = order[..., : int(filled.sum(-1).max()) if filled.numel() else 0]
    named = {}
    for name, tensor, names in state.named():
        if "slot" in names:
            where = filled if tensor.dim() == 3 else filled.unsqueeze(-1)
            empty = -1 if name == "pos" else 0
            tensor = torch.where(where, tensor, torch.full_like(tensor, empty))
            index = order if tensor.dim() == 3 else order.unsqueeze(-1)
            tensor = torch.take_along_dim(tensor, index, 2)
        named[name] = tensor
    extra = {name: named[f"extra.{name}"] for name in state.extra}
    return replace(state, k=named["k"], v=named["v"], pos=named["pos"], extra=extra)


def lists_of(state: State) -> list[KVState]:
    """The lists of keys and values in a state, layer by layer."""
    layers = state.layers if isinstance(state, ModelState) else (state,)
    return [layer for layer in layers if isinstance(layer, KVState)]


def slots_over(layer: KVState, policy: Eviction | None, fed: int) -> float:
    """Slots above what is allowed in any row and head."""
    counts, allowed = (layer.pos >= 0).sum(-1), layer.seen.clamp(max=fed)
    if policy is not None and isinstance(policy.budget, int):
        allowed = torch.minimum(allowed, policy.budget + layer.seen % policy.every)
    slack = layer.pos.shape[-1] - int(counts.max()) if counts.numel() else 0
    return max(float((counts - allowed.unsqueeze(1)).max()), float(slack))


def bytes_over(state: State, policy: Eviction) -> float:
    """Bytes of one row's lists, positions and marks beyond the policy's budget in bytes."""
    layers = lists_of(state)
    budget = sum(policy.for_layer(i, len(layers)).in_bytes for i in range(len(layers)))
    held = 0
    for layer in layers:
        marks = [t for name, t in layer.extra.items() if name.startswith(MARK)]
        held += sum(t.nbytes for t in (layer.k, layer.v, layer.pos, layer.seen, *marks))
    return float(held - budget)
