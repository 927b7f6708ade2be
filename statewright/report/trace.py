"""What a model holds while it reads: which tokens each list keeps, norms of recurrences, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statewright.diagnosis.heads import carried_by_head, recurrent_states
from statewright.session import Session
from statewright.state import KVState, ModelState

FORMAT = "statewright-trace-1"
# Looks at a text: more would be finer than a page can show.
MOST_LOOKS = 80
_MOST_CELLS = 4_000_000
_KINDS = {
    "k": "keys",
    "v": "values",
    "pos": "positions",
    "seen": "positions",
    "S": "recurrent state",
    "h": "recurrent state",
    "c": "recurrent state",
}


def trace(
    model: nn.Module, ids: Tensor, tokens: Sequence[str], policies: Sequence[str], every: int = 0
) -> dict[str, Any]:
    """Read ids (T,) under "none" and each policy; look at the state after every `every` tokens.

    tokens: their texts. every: 0 for one look in 64th parts of the text. A run holds, for every
    list of keys, `left`: per head (one, if all heads agree) and token the tokens read at the first
    look without it, 0 if it stayed. What comes and goes between two looks is seen at the second.
    Raises ValueError for fewer than 2 tokens, more than 80 looks, and what a Session refuses.
    """
    T = len(ids)
    every = every or max(1, -(-T // 64))
    if T < 2 or len(tokens) != T:
        raise ValueError(f"trace: {T} ids and {len(tokens)} tokens, expected as many, at least 2")
    if every < 1 or -(-T // every) > MOST_LOOKS:
        raise ValueError(
            f"every={every}: {T} tokens would be looked at {-(-T // max(every, 1))} times, "
            f"expected at most {MOST_LOOKS}; choose at least {-(-T // MOST_LOOKS)}"
        )
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    runs = [_run(model, ids, policy, every) for policy in dict.fromkeys(["none", *policies])]
    return {
        "format": FORMAT,
        "every": every,
        "tokens": list(tokens),
        "weights_bytes": sum(weights.values()),
        "runs": runs,
    }


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, policy: str, every: int) -> dict[str, Any]:
    session = Session(model, policy, chunk=every, snapshot_bytes=0)
    looks, sizes, norms = [], [], {}
    lists: dict[str, Tensor] = {}
    for begin in range(0, len(ids), every):
        session.feed(ids[begin : begin + every])
        state = session.state
        assert isinstance(state, ModelState)
        looks.append(session.seen)
        sizes.append(state.nbytes)
        for layer, held in _lists(state):
            _look(lists, layer, held, session.seen, len(ids))
        for layer, part in recurrent_states(state):
            norm = carried_by_head(part)[0].norm(dim=-1)
            norms.setdefault(layer, []).append([round(x, 6) for x in norm.tolist()])
    return {
        "policy": policy,
        "looks": looks,
        "state_bytes": sizes,
        "kinds": kinds(state),
        "lists": [{"layer": name, **_left(found)} for name, found in lists.items()],
        "norms": [{"layer": name, "norm": rows} for name, rows in norms.items()],
    }


def _lists(state: ModelState) -> Iterator[tuple[str, KVState]]:
    for i, layer in enumerate(state.layers):
        for j, part in enumerate(layer if isinstance(layer, tuple) else (layer,)):
            if isinstance(part, KVState):
                yield (f"{i}.{j}" if isinstance(layer, tuple) else str(i)), part


def _look(lists: dict[str, Tensor], layer: str, held: KVState, seen: int, length: int) -> None:
    """Tokens of the first row that are gone since the look before; -1 is unseen, 0 is held."""
    pos = held.pos[0].cpu()
    left = lists.setdefault(layer, torch.full((pos.shape[0], length), -1, dtype=torch.int64))
    if left.numel() > _MOST_CELLS:
        raise ValueError(f"trace: {length} tokens are too many to follow in every head; read fewer")
    kept = torch.zeros_like(left, dtype=torch.bool)
    head, slot = (pos >= 0).nonzero(as_tuple=True)
    kept[head, pos[head, slot]] = True
    alive = (left <= 0) & (torch.arange(length) < seen)
    left[alive] = torch.where(kept, 0, seen)[alive]


def _left(left: Tensor) -> dict[str, Any]:
    same = bool((left == left[:1]).all())
    return {"heads": left.shape[0], "left": (left[:1] if same else left).tolist()}


def kinds(state: ModelState) -> dict[str, int]:
    """Bytes by kind: keys, values, positions, recurrent state, convolution, and a policy's own."""
    found: dict[str, int] = {}
    for name, tensor in state.items():
        last = name.rpartition(".")[2]
        other = "convolution" if "taps" in last or "conv" in last else last
        kind = _KINDS.get(last, "scores" if last.startswith("policy") else other)
        found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
    return found
