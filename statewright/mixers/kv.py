"""A list of keys and values that grows, is attended to, and is bounded by a policy."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.policies.base import MARK, Eviction
from statewright.policies.simulate import Rule, simulate
from statewright.policies.timeline import Timeline
from statewright.policies.working import WorkingSlots
from statewright.state import KVState

_QUERIES = 256
_MARK_AXES = "batch head slot"


def empty_list(
    batch_size: int, heads: int, key: int, value: int, dtype: torch.dtype, device: torch.device
) -> KVState:
    """No slots at all."""
    return KVState(
        k=torch.zeros(batch_size, heads, 0, key, dtype=dtype, device=device),
        v=torch.zeros(batch_size, heads, 0, value, dtype=dtype, device=device),
        pos=torch.zeros(batch_size, heads, 0, dtype=torch.long, device=device),
        seen=torch.zeros(batch_size, dtype=torch.long, device=device),
    )


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KVState,
    timeline: Timeline,
    rule: Rule,
    policy: Eviction | None = None,
    block: int = 1,
) -> tuple[Tensor, KVState]:
    """Append T tokens, attend, evict: q (B, H * R, T, Dh), k, v (B, H, T, Dh) -> (B, H * R, T, Dv).

    `timeline` says where the tokens stand; the queries of key head h are h * R ... h * R + R - 1.
    Under a policy a query sees exactly what it would see token by token (block=1), or block by
    block. The state's tensors are fresh: none is a view of this call's keys or of the old state.
    """
    B, H, T, _ = k.shape
    if T == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state
    if policy is not None:
        policy = bounded(policy, state, k, v)
        if _in_turns(policy, state, timeline, rule, block, q, k, v):
            return _one_by_one(q, k, v, state, rule, policy)
    q = q.unflatten(1, (H, -1))
    keys, values = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
    died: Tensor | None = None
    marks: dict[str, Tensor] = {}
    if policy is not None:
        old = marks_of(policy, state)
        if policy.mark_names or policy.budget < keys.shape[2]:
            died, marks = simulate(policy, q, keys, values, old, timeline, rule, block)
    everything = timeline.plain and died is None and rule.placement is None
    if everything and rule.is_plain and (rule.window is None or rule.window >= T):
        out = _causal(q, keys, values, rule)
    else:
        attend = _attend if rule.placement is None else _attend_placed
        out = attend(q, keys, values, timeline, died, rule)
    left = timeline.remaining(died, rule.window)
    return out.flatten(1, 2), tidy(
        state, keys, values, timeline.pos, timeline.seen[:, -1], left, marks
    )


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _in_turns(
    policy: Eviction, state: KVState, timeline: Timeline, rule: Rule, block: int, *tensors: Tensor
) -> bool:
    """Whether tokens are better taken one after the other in preallocated slots.

    One token always; several if keys turn anew for every query, so that nothing is gained by
    taking them together. Not with gradients, masked tokens or resets.
    """
    T = timeline.seen.shape[1]
    evicts = state.pos.shape[-1] + T > policy.budget
    if T > 1 and (rule.placement is None or block != 1 or not evicts):
        return False
    if needs_grad(*tensors, state.k, state.v):
        return False
    if not bool(timeline.active.all()) or bool(timeline.query_segment.any()):
        return False
    return WorkingSlots.fits(policy, state, rule)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, state: KVState, rule: Rule, policy: Eviction
) -> tuple[Tensor, KVState]:
    T = k.shape[2]
    if T > 1:
        announce_turns()
    slots = WorkingSlots(policy, state, rule, spare=T > 1)
    at = [slice(t, t + 1) for t in range(T)]
    outputs = [slots.step(q[:, :, t], k[:, :, t], v[:, :, t], rule) for t in at]
    return torch.cat(outputs, 2), slots.state()


@cache
def announce_turns() -> None:
    warnings.warn(
        "positions other than 'original' change with every eviction, so keys are turned anew for "
        "every query: attention takes the tokens of a call one by one",
        stacklevel=2,
    )


def bounded(policy: Eviction, state: KVState, k: Tensor, v: Tensor) -> Eviction:
    """The policy with its budget in tokens; ValueError if it cannot go on from this state."""
    if getattr(policy, "per", "head") == "layer" and state.pos.shape[1] > 1:
        pos = state.pos
        if not bool((pos == pos[:, :1]).all()):
            raise ValueError(
                f"{policy.label}: per='layer' cannot continue a state whose heads hold different "
                "tokens (it was bounded per head)"
            )
    return policy.in_tokens(policy.slot_bytes(k, v))


def marks_of(policy: Eviction, state: KVState) -> dict[str, Tensor]:
    """The policy's numbers per slot; zeros if the state comes from elsewhere."""
    wide = torch.float64 if state.k.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(state.pos.shape, dtype=wide, device=state.k.device)
    return {name: state.extra.get(MARK + name, zeros) for name in policy.mark_names}


def tidy(
    state: KVState,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    seen: Tensor,
    left: Tensor,
    marks: dict[str, Tensor],
) -> KVState:
    """The state that holds the entries `left` (B, H, M) of k, v, pos and marks, and no others.

    N is the largest number of them in any row and head; the slots beyond are zero, pos -1. Extras
    of the old state that are no policy's marks stay.
    """
    for name in [n for n in state.extra if n.startswith(MARK)]:
        state = state.without_extra(name)
    if torch.compiler.is_compiling():
        # How many are left is not known while a graph is traced, so the others stay as empty slots.
        empty = ~left.unsqueeze(-1)
        k, v = k.masked_fill(empty, 0), v.masked_fill(empty, 0)
        new = replace(state, k=k, v=v, pos=pos.masked_fill(~left, -1), seen=seen)
    elif bool(left.all()):
        new = replace(state, k=k, v=v, pos=pos, seen=seen)
    else:
        counts = left.sum(-1, keepdim=True)
        N = int(counts.max())
        order = (~left).to(torch.uint8).argsort(dim=-1, stable=True)[..., :N]
        filled = torch.arange(N, device=k.device) < counts
        wide = order.unsqueeze(-1)
        empty = ~filled.unsqueeze(-1)
        k = k.gather(2, wide.expand(*order.shape, k.shape[-1])).masked_fill(empty, 0)
        v = v.gather(2, wide.expand(*order.shape, v.shape[-1])).masked_fill(empty, 0)
        pos = pos.gather(-1, order).masked_fill(~filled, -1)
        marks = {n: m.gather(-1, order).masked_fill(~filled, 0) for n, m in marks.items()}
        new = replace(state, k=k, v=v, pos=pos, seen=seen)
    for name, mark in marks.items():
        new = new.with_extra(MARK + name, mark, _MARK_AXES)
    return new


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Every query over the tokens up to its own, without a mask in memory: (B, H, R, T, Dv)."""
    if q.shape[2] > 1:
        k, v = (t.unsqueeze(2).expand(*q.shape[:3], *t.shape[2:]).flatten(1, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=rule.scale)
    return out.unflatten(1, q.shape[1:3])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, timeline: Timeline, died: Tensor | None, rule: Rule
) -> Tensor:
    """Every query over what it sees, some hundred queries at a time: (B, H, R, T, Dv)."""
    T, N = q.shape[3], timeline.num_old
    outputs = []
    for begin in range(0, T, _QUERIES):
        end = min(begin + _QUERIES, T)
        index = _candidates(timeline, begin, end, died, rule.window)
        if index is None:
            count = N + end
            index = torch.arange(count, device=k.device).expand(*k.shape[:2], count)
            keys, values = k[:, :, :count], v[:, :, :count]
        else:
            entry = index.clamp(max=k.shape[2] - 1).unsqueeze(-1)
            keys, values = (t.gather(2, entry.expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        visible = timeline.visible(begin, end, index, died, rule.window)
        outputs.append(weighted(q[:, :, :, begin:end], keys, values, visible, rule))
    return torch.cat(outputs, 3) if len(outputs) > 1 else outputs[0]


def _attend_placed(
    q: Tensor, k: Tensor, v: Tensor, timeline: Timeline, died: Tensor | None, rule: Rule
) -> Tensor:
    """As `_attend` for un-rotated q and k: one placement for every span without an eviction.

    Within such a span the tokens that a query sees are neighbours in the order of positions, so
    that places found for all of them differ from the query's own by a constant, which rotations
    do not see.
    """
    T, N = q.shape[3], timeline.num_old
    ends = [] if died is None else died[(died >= 0) & (died < T - 1)].unique().add(1).tolist()
    ends = sorted({*ends, *range(_QUERIES, T, _QUERIES), T})
    if died is not None and len(ends) > T // 2 > 1:
        announce_turns()
    outputs = []
    for begin, end in zip([0, *ends], ends):
        index = _in_order(timeline, begin, end, died)
        entry = index.clamp(max=k.shape[2] - 1)
        keys, values = (
            t.gather(2, entry.unsqueeze(-1).expand(*entry.shape, t.shape[-1])) for t in (k, v)
        )
        pos = timeline.pos.gather(-1, entry).masked_fill(index != entry, -1)
        segment = timeline.segment.unsqueeze(1).expand_as(timeline.pos).gather(-1, entry)
        places = rule.placement.places(pos, segment)
        own = places.new_zeros(*places.shape[:2], k.shape[2] + 1).scatter_(-1, index, places)
        turned = q[:, :, :, begin:end]
        own = own[..., N + begin : N + end].unsqueeze(2).expand(turned.shape[:-1])
        turned = rule.placement.turn(turned.flatten(2, 3), own.flatten(2)).view(turned.shape)
        keys = rule.placement.turn(keys, places).to(k.dtype)
        visible = timeline.visible(begin, end, index, died, rule.window)
        outputs.append(weighted(turned.to(q.dtype), keys, values, visible, rule))
    return torch.cat(outputs, 3) if len(outputs) > 1 else outputs[0]


def _in_order(timeline: Timeline, begin: int, end: int, died: Tensor | None) -> Tensor:
    """(B, H, A): the entries that columns [begin, end) may see, M for none."""
    M = timeline.num_old + end
    alive = timeline.pos[..., :M] >= 0
    if died is not None:
        alive = alive & (died[..., :M] >= begin)
    counts = alive.sum(-1, keepdim=True)
    index = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)
    index = index[..., : max(int(counts.max()), 1)]
    nobody = timeline.pos.shape[-1]
    return torch.where(torch.arange(index.shape[-1], device=index.device) < counts, index, nobody)


def _candidates(
    timeline: Timeline, begin: int, end: int, died: Tensor | None, window: int | None
) -> Tensor | None:
    """(B, H, A): the entries that columns [begin, end) may see, M for none; None: take all."""
    M = timeline.num_old + end
    if (died is None and window is None) or torch.compiler.is_compiling():
        return None
    alive = timeline.pos[..., :M] >= 0
    if died is not None:
        alive = alive & (died[..., :M] >= begin)
    if window is not None:
        entry = torch.arange(M, device=alive.device)
        # The oldest that column `begin` sees; later columns see later ones, or another segment.
        first = timeline.query_pos[:, None, begin, None] - window
        alive = alive & ((timeline.pos[..., :M] > first) | (entry >= timeline.num_old + begin))
    counts = alive.sum(-1, keepdim=True)
    A = int(counts.max())
    if A * 4 > M * 3:
        return None
    index = (~alive).to(torch.uint8).argsort(dim=-1, stable=True)[..., :A]
    nobody = timeline.pos.shape[-1]
    return torch.where(torch.arange(A, device=index.device) < counts, index, nobody)


def weighted(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: Rule) -> Tensor:
    """Attention of q (B, H, R, C, Dh) over k, v (B, H, A, Dh), where visible (B, H, C, A) says.

    A query that sees nothing (a masked token) gets some finite value.
    """
    B, H, R, C, _ = q.shape
    rows = q.reshape(B, H, R * C, q.shape[-1])
    if rule.softcap is not None or rule.sinks is not None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        logits = (rows @ k.mT).view(B, H, R, C, -1).to(wide)
        weights = rule.weights(logits, visible).to(v.dtype)
        return (weights.flatten(2, 3) @ v).view(B, H, R, C, -1)
    visible = visible | ~visible.any(-1, keepdim=True)
    mask = visible.unsqueeze(2).expand(B, H, R, C, visible.shape[-1]).reshape(B, H, R * C, -1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=rule.scale)
    return out.view(B, H, R, C, -1)
