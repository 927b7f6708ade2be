"""One token at a time in flat memory: the victim's slot is overwritten by the newest token."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.policies.base import MARK, Eviction, Slots, victim
from statewright.policies.simulate import Rule
from statewright.state import KVState

_MARK_AXES = "batch head slot"


class WorkingSlots:
    """A list while it decodes: the first `count` slots of preallocated ones hold it.

    The owner's private workspace, written in place: a new token is written behind the kept ones,
    attended to, and, once the list is full, moved into the victim's slot. Room grows by a quarter
    until it is budget + 1 slots (`spare=False`: by one). For unmasked single tokens without
    gradients and `every` = 1; it then chooses as `simulate` does, in some twenty operations.
    policy None: nothing leaves but what the rule's window hides.
    """

    def __init__(
        self, policy: Eviction | None, state: KVState, rule: Rule, spare: bool = True
    ) -> None:
        self.policy, self.spare, self.count = policy, spare, state.pos.shape[-1]
        self.limit = _limit(policy, rule)
        self.k, self.v, self.pos = (t.detach() for t in (state.k, state.v, state.pos))
        self.seen = state.seen
        wide = torch.float64 if state.k.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(state.pos.shape, dtype=wide, device=state.k.device)
        names = () if policy is None else policy.mark_names
        self.marks = {n: state.extra.get(MARK + n, zeros).detach() for n in names}
        self.last = torch.zeros_like(state.seen)
        self._extra, self._axes = _others(state)
        self.shared = _is_shared(policy) and bool((state.pos == state.pos[:, :1]).all())
        self._grow()

    @staticmethod
    def fits(policy: Eviction | None, state: KVState, rule: Rule) -> bool:
        """Whether this policy and rule may go on from a state here, one token for one slot."""
        limit, N = _limit(policy, rule), state.pos.shape[-1]
        if (policy is not None and policy.every != 1) or (limit is not None and limit < N):
            return False
        if N and not bool((state.pos >= 0).all()):
            return False
        if rule.window is None or N == 0 or (policy is not None and policy.budget == N):
            return True
        # Below the limit a token could leave the window and its slot would stay in sight.
        return bool((state.pos.amin(-1) == state.seen.unsqueeze(-1) - N).all())

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Append, attend, evict: q (B, H * R, 1, Dh), k, v (B, H, 1, Dh) -> (B, H * R, 1, Dv)."""
        n = self.count
        if n == self.pos.shape[-1]:
            self._grow()
        self.k.narrow(2, n, 1).copy_(k)
        self.v.narrow(2, n, 1).copy_(v)
        self.pos.narrow(2, n, 1).copy_(self.seen.view(-1, 1, 1))
        self.seen = self.seen + 1
        self.marks = {name: F.pad(mark, (0, 1)) for name, mark in self.marks.items()}
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, rows, peak = self._attend(q, n + 1, rule, wide)
        full = self.limit is not None and n >= self.limit
        if not full and not self.marks:
            self.count = n + 1
            return out
        keys, values, pos = (t.narrow(2, 0, n + 1) for t in (self.k, self.v, self.pos))
        if self.policy is not None and self.policy.needs == "keys":
            keys, values = keys.to(wide), values.to(wide)
        if self.shared:
            # One victim for all heads, so the heads count as query heads of a single one.
            keys, values, pos = (t[:, :1] for t in (keys, values, pos))
            rows = None if rows is None else rows.mean(2).unsqueeze(1)
            peak = None if peak is None else peak.amax(1, keepdim=True)
        slots = Slots(keys, values, pos, self.seen, rows, self.last, self.marks, peak)
        if self.marks:
            assert self.policy is not None
            self.marks = self.policy.observe(slots)
            slots = replace(slots, marks=self.marks)
        if full:
            self._move_last(self._victim(slots, rule).expand(*k.shape[:2], 1), k, v)
        else:
            self.count = n + 1
        return out

    def _attend(
        self, q: Tensor, n: int, rule: Rule, wide: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output; the attention (B, H, R, 1, n) and its largest logit if they are read."""
        keys, values = self.k.narrow(2, 0, n), self.v.narrow(2, 0, n)
        B, H = keys.shape[:2]
        q = q.view(B, H, -1, q.shape[-1])
        if rule.placement is not None:
            pos = self.pos[:, :1] if self.shared else self.pos
            places = rule.placement.places(pos.narrow(2, 0, n))
            q = rule.placement.turn(q, places[..., -1:]).to(q.dtype)
            keys = rule.placement.turn(keys, places).to(keys.dtype)
        looks = self.policy is not None and self.policy.needs in ("last_row", "column_sums")
        if rule.is_plain and not looks:
            out = F.scaled_dot_product_attention(q, keys, values, scale=rule.scale)
            return out.view(B, -1, 1, values.shape[-1]), None, None
        logits = (q.to(wide) @ keys.to(wide).mT).unsqueeze(3)
        weights = rule.weights(logits, None)
        out = weights.squeeze(3).to(values.dtype) @ values
        peak = rule.peak(logits, None) if looks else None
        return out.view(B, -1, 1, values.shape[-1]), weights, peak

    def _victim(self, slots: Slots, rule: Rule) -> Tensor:
        """(B, H, 1): the slot that leaves; what the window hides from now on goes first."""
        if self.policy is None:
            return slots.pos.argmin(-1, keepdim=True)
        score = self.policy.score(slots)
        if rule.window is not None:
            hidden = slots.pos <= (self.seen - rule.window).view(-1, 1, 1)
            score = score.masked_fill(hidden, float("-inf"))
        return victim(self.policy, slots, score)

    def _move_last(self, to: Tensor, k: Tensor, v: Tensor) -> None:
        """The newest token, behind the kept ones, moves into the slots `to` (B, H, 1)."""
        n = self.count
        at = to.unsqueeze(-1)
        self.k.scatter_(2, at.expand(*k.shape), k)
        self.v.scatter_(2, at.expand(*v.shape), v)
        # A copy: with one row and one head torch sees that source and target share memory.
        self.pos.scatter_(2, to, self.pos[:, :, n : n + 1].clone())
        self.marks = {
            name: mark.scatter(2, to, mark[..., n:])[..., :n] for name, mark in self.marks.items()
        }

    def _grow(self) -> None:
        """Fresh tensors with room behind the kept slots."""
        n = self.count
        room = n + (max(n // 4, 32) if self.spare else 1)
        if self.limit is not None:
            room = min(room, self.limit + 1)

        def grown(t: Tensor) -> Tensor:
            new = t.new_empty(*t.shape[:2], room, *t.shape[3:])
            new[:, :, :n] = t[:, :, :n]
            return new

        self.k, self.v, self.pos = grown(self.k), grown(self.v), grown(self.pos)

    def rows(self, index: Tensor) -> WorkingSlots:
        """The given rows of the batch in a workspace of their own."""
        new = copy.copy(self)
        index = index.to(self.seen.device)
        for name in ("k", "v", "pos", "seen", "last"):
            setattr(new, name, getattr(self, name).index_select(0, index))
        new.marks = {n: mark.index_select(0, index) for n, mark in self.marks.items()}
        new._extra = {n: t.index_select(0, index) for n, t in self._extra.items()}
        return new

    def state(self) -> KVState:
        """The kept slots as a value of its own."""
        return self.lend(None).map(torch.clone)

    def lend(self, like: KVState | None) -> KVState:
        """The kept slots where they are: valid until the next step. Other extras as in `like`."""
        n = self.count
        extra, axes = (self._extra, self._axes) if like is None else _others(like)
        state = KVState(
            k=self.k[:, :, :n],
            v=self.v[:, :, :n],
            pos=self.pos[:, :, :n],
            seen=self.seen,
            extra=extra,
            extra_axes=axes,
        )
        for name, mark in self.marks.items():
            state = state.with_extra(MARK + name, mark, _MARK_AXES)
        return state


def _is_shared(policy: Eviction | None) -> bool:
    """Whether all key heads lose the same token and nothing is remembered per head."""
    if policy is None:
        return True
    if policy.mark_names or policy.needs == "keys":
        return False
    return policy.needs == "none" or getattr(policy, "per", "head") == "layer"


def _limit(policy: Eviction | None, rule: Rule) -> int | None:
    """The most slots a list keeps; None: without end."""
    bounds = [] if policy is None else [int(policy.budget)]
    if rule.window is not None:
        bounds.append(rule.window - 1)
    return min(bounds, default=None)


def _others(state: KVState) -> tuple[dict, dict]:
    """The extras that are no policy's marks, and their axes."""
    extra = {n: t for n, t in state.extra.items() if not n.startswith(MARK)}
    return extra, {n: state.extra_axes[n] for n in extra}
