"""Retention without seeing a gate: change a state, read on, and see what is left of the change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from statewright.diagnosis.heads import carried_by_head, recurrent_states
from statewright.diagnosis.runner import Runner
from statewright.state import MatrixState, ModelState, State


@torch.no_grad()
def retention_by_change(
    run: Runner, state: ModelState, ids: Tensor, layers: Sequence[str]
) -> dict[str, list[float]]:
    """What is left, per head, of the state of each layer after the tokens ids (B, T).

    The layer's state is emptied and the same tokens are read: gates of a linear recurrence depend
    on its inputs alone, and those on the layers below, so that the difference of the two later
    states is exactly the old content times its decays. Its norm, over that of the old content.
    For a nonlinear recurrence it says how far the old content still matters.
    """
    after = dict(recurrent_states(_read(run, ids, state)))
    before = dict(recurrent_states(state))
    found = {}
    for name in layers:
        without = dict(recurrent_states(_read(run, ids, _emptied(state, name))))
        change = carried_by_head(after[name]) - carried_by_head(without[name])
        old = carried_by_head(before[name]).norm(dim=-1).clamp(min=1e-30)
        found[name] = (change.norm(dim=-1) / old).mean(0).tolist()
    return found


def _read(run: Runner, ids: Tensor, state: ModelState) -> ModelState:
    for piece in ids.split(run.batch_of(ids.shape[0]), 1):
        state = run(piece, state).state
    return state


def _emptied(state: ModelState, name: str) -> ModelState:
    place, _, inner = name.partition(".")
    layers = list(state.layers)
    layer = layers[int(place)]
    if inner:
        parts = list(layer)
        parts[int(inner)] = _empty(parts[int(inner)])
        layers[int(place)] = tuple(parts)
    else:
        layers[int(place)] = _empty(layer)
    return replace(state, layers=tuple(layers))


def _empty(state: State) -> State:
    """Only what the recurrence carries: taps and everything else stay as they are."""
    if isinstance(state, MatrixState):
        return replace(state, S=torch.zeros_like(state.S))
    if "c" in state.extra:
        extra = {**state.extra, "c": torch.zeros_like(state.extra["c"])}
        return replace(state, extra=extra)
    return replace(state, h=torch.zeros_like(state.h))
