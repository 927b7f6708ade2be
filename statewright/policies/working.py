"""One token at a time in flat memory: the victim's slot is overwritten by the next token."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from statewright.policies.base import MARK, Eviction, Slots, lowest
from statewright.policies.simulate import Rule
from statewright.state import KVState


class WorkingSlots:
    """budget + 1 preallocated slots per head, one of them free: a full state while it decodes.

    The owner's private workspace, written in place; `state()` copies it out as a value. For
    unmasked single tokens without gradients, `every` = 1 and a rule without window, soft cap or
    sinks; it then chooses as `simulate` does, in some twenty operations whatever the budget.
    """

    def __init__(self, policy: Eviction, state: KVState) -> None:
        self.policy = policy
        # Only what the slots do not hold: no reference keeps the old keys alive.
        kept = {n: t for n, t in state.extra.items() if not n.startswith(MARK)}
        axes = {n: state.extra_axes[n] for n in kept}
        self._like = KVState(
            k=state.k[:, :, :0].clone(),
            v=state.v[:, :, :0].clone(),
            pos=state.pos[:, :, :0].clone(),
            seen=state.seen,
            extra=kept,
            extra_axes=axes,
        )
        wide = torch.float64 if state.k.dtype == torch.float64 else torch.float32

        def with_free(t: Tensor) -> Tensor:
            grown = t.new_zeros(*t.shape[:2], t.shape[2] + 1, *t.shape[3:])
            grown[:, :, :-1] = t
            return grown

        self.k, self.v = with_free(state.k.detach()), with_free(state.v.detach())
        self.pos, self.seen = with_free(state.pos), state.seen.clone()
        zeros = torch.zeros(state.pos.shape, dtype=wide, device=state.k.device)
        names = policy.mark_names
        self.marks = {n: with_free(state.extra.get(MARK + n, zeros)) for n in names}
        self.free = torch.full_like(state.pos[..., :1], state.pos.shape[-1])
        self.last = torch.zeros_like(state.seen)

    @staticmethod
    def fits(policy: Eviction, state: KVState, rule: Rule) -> bool:
        """Whether a state is full and this policy and rule may go on here."""
        if policy.every != 1 or rule.window or rule.softcap is not None or rule.sinks is not None:
            return False
        return state.pos.shape[-1] == policy.budget and bool((state.pos >= 0).all())

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """Append, attend, evict: q (B, H * R, 1, Dh), k, v (B, H, 1, Dh) -> (B, H * R, 1, Dv)."""
        B, H = k.shape[:2]
        at = self.free.unsqueeze(-1)
        self.k.scatter_(2, at.expand_as(k), k)
        self.v.scatter_(2, at.expand_as(v), v)
        self.pos.scatter_(2, self.free, self.seen.view(-1, 1, 1).expand_as(self.free))
        for mark in self.marks.values():
            mark.scatter_(2, self.free, 0.0)
        self.seen += 1
        logits = (q.view(B, H, -1, q.shape[-1]) @ self.k.mT) * rule.scale
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        weights = logits.softmax(-1, dtype=wide)
        out = (weights.to(v.dtype) @ self.v).view(B, -1, 1, v.shape[-1])
        self.free = self._victim(weights.unsqueeze(3), wide)
        return out

    def _victim(self, rows: Tensor, wide: torch.dtype) -> Tensor:
        k, v = self.k, self.v
        if self.policy.needs == "keys":
            k, v = k.to(wide), v.to(wide)
        slots = Slots(k, v, self.pos, self.seen, rows, self.last, self.marks)
        if self.marks:
            self.marks = self.policy.observe(slots)
            slots = replace(slots, marks=self.marks)
        return lowest(self.policy.score(slots), self.pos)

    def rows(self, index: Tensor) -> WorkingSlots:
        """The given rows of the batch in a workspace of their own."""
        new = copy.copy(self)
        index = index.to(self.seen.device)
        for name in ("k", "v", "pos", "seen", "free", "last"):
            setattr(new, name, getattr(self, name).index_select(0, index))
        new.marks = {n: mark.index_select(0, index) for n, mark in self.marks.items()}
        new._like = self._like.rows(index)
        return new

    def state(self) -> KVState:
        """The kept slots as a value of its own."""
        S = self.pos.shape[-1]
        order = torch.arange(S - 1, device=self.pos.device).expand(*self.pos.shape[:2], S - 1)
        # The last slot moves into the free one's place.
        order = torch.where(order == self.free, S - 1, order)
        wide = order.unsqueeze(-1)
        state = replace(
            self._like,
            k=self.k.gather(2, wide.expand(*order.shape, self.k.shape[-1])),
            v=self.v.gather(2, wide.expand(*order.shape, self.v.shape[-1])),
            pos=self.pos.gather(2, order),
            seen=self.seen.clone(),
        )
        for name, mark in self.marks.items():
            state = state.with_extra(MARK + name, mark.gather(2, order), "batch head slot")
        return state
