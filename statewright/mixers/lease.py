"""Donated lists: one caller decodes in place, and nobody reads a list that was written over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from statewright.mixers.kv import bounded, needs_grad
from statewright.policies import Eviction
from statewright.policies.simulate import Rule
from statewright.policies.working import WorkingSlots
from statewright.state import KVState

# By a state's key tensor, so that copies of the State object around it are known as well: the
# policy and the workspace whose slots it shows, or None once it has been donated.
_LEASES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def refuse_donated(state: KVState) -> None:
    """ValueError for a state that an earlier call was allowed to write over (not in a graph)."""
    if torch.compiler.is_compiling():
        return
    if _LEASES.get(state.k, ()) is None:
        raise ValueError(
            "Attention: this state was donated to an earlier call (donate=True), which may have "
            "written over it; go on from the state that call returned, or do not donate"
        )


def use_up(state: KVState) -> None:
    """Mark a state as donated."""
    _LEASES[state.k] = None


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, state: KVState, rule: Rule, policy: Eviction | None
) -> tuple[Tensor, KVState] | None:
    """One unmasked token for a donated state, written into its slots; None where that cannot be.

    The first call copies the list into slots with room; the state that it returns shows them and
    is donated by the next call. policy None: the list grows, a quarter at a time.
    """
    if needs_grad(q, k, v, state.k, state.v):
        return None
    asked, slots = _LEASES.get(state.k) or (None, None)
    if slots is None or asked != policy:
        own = None if policy is None else bounded(policy, state, k, v)
        if not WorkingSlots.fits(own, state, rule):
            return None
        slots = WorkingSlots(own, state, rule)
    use_up(state)
    out = slots.step(q, k, v, rule)
    new = slots.lend(state)
    _LEASES[new.k] = policy, slots
    return out, new
