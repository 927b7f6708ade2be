"""Exact eviction over many tokens: only the choices are made one by one, the rest in parallel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from statewright.policies.base import Eviction, Slots, victim, victims
from statewright.policies.placement import Placement
from statewright.policies.timeline import NEVER, Timeline


@dataclass(frozen=True)
class Rule:
    """How a layer attends: logits q.k * scale, soft-capped, within a window of positions.

    sinks (query heads,): a learned logit per head that takes attention and gives nothing.
    placement: q and k come un-rotated and are turned by their places among the visible tokens;
    None: they come as they are to be multiplied.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    placement: Placement | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the weights are a mere softmax of the scaled logits."""
        return self.softcap is None and self.sinks is None

    def weights(self, logits: Tensor, visible: Tensor | None) -> Tensor:
        """Softmax of q.k (B, H, R, C, N) over the visible (B, H, C, N); zero where none is."""
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if visible is not None:
            logits = logits.masked_fill(~visible.unsqueeze(2), float("-inf"))
        elif self.sinks is None:
            return logits.softmax(-1)
        top = logits.amax(-1, keepdim=True)
        if self.sinks is not None:
            H, R = logits.shape[1:3]
            sink = self.sinks.to(logits.dtype).view(1, H, R, 1, 1)
            top = torch.maximum(top, sink)
        # No visible slot: any finite top will do, every exponential is zero.
        top = top.masked_fill(top == float("-inf"), 0)
        exp = (logits - top).exp()
        total = exp.sum(-1, keepdim=True)
        if self.sinks is not None:
            total = total + (sink - top).exp()
        return exp / total.clamp(min=torch.finfo(exp.dtype).tiny)

    def peak(self, logits: Tensor, visible: Tensor | None) -> Tensor:
        """(B, H): the largest logit in magnitude, of q.k (B, H, R, C, N) as in `weights`."""
        if visible is not None:
            logits = logits.masked_fill(~visible.unsqueeze(2), 0)
        peak = torch.linalg.vector_norm(logits, ord=torch.inf, dim=(2, 3, 4)) * self.scale
        return peak if self.softcap is None else self.softcap * (peak / self.softcap).tanh()


@torch.no_grad()
def simulate(
    policy: Eviction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    marks: dict[str, Tensor],
    timeline: Timeline,
    rule: Rule,
    block: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The last column that sees each entry, (B, H, M), and the marks of the entries at the end.

    q (B, H, R, T, Dh): R query heads per key head; k, v (B, H, M, Dh): the N old and T new tokens;
    marks (B, H, N). block=1 is the policy as defined, token by token; block=c appends c tokens,
    attends causally and evicts at the block's end, whatever `every` says. The choices are made on
    detached copies in at least float32; gradients flow through the attention that follows.
    """
    T = q.shape[3]
    bank = _Bank(policy, q, k, v, marks, timeline, rule, block)
    begin = 0
    while begin < T:
        if block == 1 and bank.is_full():
            bank.replace_one_by_one(begin, T)
            break
        # What fits needs no choice; blocks keep their places, counted from the call's first token.
        step = max(bank.room() // block, 1) * block
        end = min(begin + step, T)
        bank.advance(begin, end, block > 1)
        begin = end
    return bank.died[..., :-1], bank.marks_of_entries()


class _Bank:
    """The slots at work: preallocated, a victim's slot is overwritten by a later token."""

    def __init__(
        self,
        policy: Eviction,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        marks: dict[str, Tensor],
        timeline: Timeline,
        rule: Rule,
        block: int,
    ) -> None:
        self.policy, self.timeline, self.rule = policy, timeline, rule
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = (t.detach().to(wide) for t in (q, k, v))
        B, H, M, _ = k.shape
        N = timeline.num_old
        assert isinstance(policy.budget, int)
        most = max(N, policy.budget + policy.every - 1) + max(block, 1)
        S = min(most, M)
        self.most = min(policy.budget, S)
        self.index = torch.full((B, H, S), M, device=k.device)
        self.index[..., :N] = torch.arange(N, device=k.device)
        self.pos = torch.full((B, H, S), -1, device=k.device)
        self.pos[..., :N] = timeline.pos[..., :N]
        self.keys = self.k.new_zeros(B, H, S, k.shape[-1])
        self.keys[:, :, :N] = self.k[:, :, :N]
        self.values = self.v.new_zeros(B, H, S, v.shape[-1] if policy.needs == "keys" else 0)
        if policy.needs == "keys":
            self.values[:, :, :N] = self.v[:, :, :N]
        self.marks = {n: self.k.new_zeros(B, H, S) for n in policy.mark_names}
        for name, mark in self.marks.items():
            mark[..., :N] = marks[name].to(wide)
        self.died = torch.full((B, H, M + 1), NEVER, device=k.device)
        self.plain = bool(timeline.active.all()) and rule.window is None
        self.plain = self.plain and not bool(timeline.query_segment.any())

    def room(self) -> int:
        """Tokens that surely fit without any eviction, as if fed one by one."""
        return self.most - int((self.pos >= 0).sum(-1).max()) if self.pos.numel() else 1

    def advance(self, begin: int, end: int, evict_now: bool) -> None:
        """Append the columns [begin, end), attend, observe, and evict where it is due."""
        self._append(begin, end)
        timeline = self.timeline
        active, seen = timeline.active[:, begin:end], timeline.seen[:, end - 1]
        rows, peak = None, None
        if self.policy.needs in ("last_row", "column_sums"):
            rows, peak = self._attention(begin, end)
        columns = torch.arange(end - begin, device=active.device)
        last = torch.where(active, columns, -1).amax(1)
        slots = Slots(self.keys, self.values, self.pos, seen, rows, last, self.marks, peak)
        self.marks.update(self.policy.observe(slots))
        self._expire(end)
        due = active.any(1) if evict_now else (seen % self.policy.every == 0) & active[:, -1]
        count = (self.pos >= 0).sum(-1)
        excess = (count - int(self.policy.budget)).clamp(min=0) * due.unsqueeze(1)
        if not bool(excess.any()):
            return
        slots = Slots(self.keys, self.values, self.pos, seen, rows, last, self.marks, peak)
        self._free(victims(self.policy, slots, self.policy.score(slots), excess), end - 1)

    def is_full(self) -> bool:
        """Whether exactly one slot is empty everywhere and every further token takes a victim's."""
        rule, policy = self.rule, self.policy
        usual = self.plain and policy.every == 1 and rule.is_plain and rule.placement is None
        full = self.pos.shape[-1] == int(policy.budget) + 1
        return usual and full and bool(((self.pos < 0).sum(-1) == 1).all())

    def replace_one_by_one(self, begin: int, end: int) -> None:
        """As `advance` for every column, in a third of its operations: the loop that takes time."""
        policy, N, last = self.policy, self.timeline.num_old, self.timeline.seen[:, 0] * 0
        looks = policy.needs in ("last_row", "column_sums")
        q = self.q * self.rule.scale
        free = (self.pos < 0).to(torch.uint8).argmax(-1, keepdim=True)
        rows, peak = None, None
        for t in range(begin, end):
            entry, at = N + t, free.unsqueeze(-1)
            self.index.scatter_(-1, free, entry)
            self.pos.scatter_(-1, free, self.timeline.pos[..., entry : entry + 1])
            new = self.k[:, :, entry : entry + 1]
            self.keys.scatter_(2, at.expand_as(new), new)
            if self.values.shape[-1]:
                new = self.v[:, :, entry : entry + 1]
                self.values.scatter_(2, at.expand_as(new), new)
            for mark in self.marks.values():
                mark.scatter_(-1, free, 0.0)
            if looks:
                logits = q[:, :, :, t] @ self.keys.mT
                rows = logits.softmax(-1).unsqueeze(3)
                peak = torch.linalg.vector_norm(logits, ord=torch.inf, dim=(2, 3))
            seen = self.timeline.seen[:, t]
            slots = Slots(self.keys, self.values, self.pos, seen, rows, last, self.marks, peak)
            if self.marks:
                self.marks.update(policy.observe(slots))
            free = victim(policy, slots, policy.score(slots))
            self.died.scatter_(-1, self.index.gather(-1, free), t)
        self.pos.scatter_(-1, free, -1)

    def _append(self, begin: int, end: int) -> None:
        """Into the first empty slots; a masked token takes one only until the end of the step."""
        N, count = self.timeline.num_old, end - begin
        empty = self.pos < 0
        if count == 1:
            free = empty.to(torch.uint8).argmax(-1, keepdim=True)
        else:
            free = (~empty).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
        entry = torch.arange(N + begin, N + end, device=free.device).expand_as(free)
        self.index.scatter_(-1, free, entry)
        self.pos.scatter_(-1, free, self.timeline.pos[..., N + begin : N + end])
        wide = free.unsqueeze(-1)
        new = self.k[:, :, N + begin : N + end]
        self.keys.scatter_(2, wide.expand_as(new), new)
        if self.values.shape[-1]:
            new = self.v[:, :, N + begin : N + end]
            self.values.scatter_(2, wide.expand_as(new), new)
        for mark in self.marks.values():
            mark.scatter_(-1, free, 0.0)

    def _attention(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(B, H, R, C, S), zero for masked columns, and the largest logit (B, H)."""
        q, keys = self.q[:, :, :, begin:end], self.keys
        B, H, R, C, D = q.shape
        if self.rule.placement is not None:
            q, keys = self._turned(q, begin, end)
        logits = (q.reshape(B, H, R * C, D) @ keys.mT).view(B, H, R, C, -1)
        if self.plain and C == 1:
            visible = (self.pos >= 0).unsqueeze(2)
        else:
            index = self.index.masked_fill(self.pos < 0, self.died.shape[-1] - 1)
            visible = self.timeline.visible(begin, end, index, None, self.rule.window)
        weights = self.rule.weights(logits, visible)
        if self.plain:
            return weights, self.rule.peak(logits, visible)
        active = self.timeline.active[:, None, begin:end, None]
        return weights * active.unsqueeze(2), self.rule.peak(logits, visible & active)

    def _turned(self, q: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The queries of the columns and all keys, rotated by their places in the list."""
        placement, nobody = self.rule.placement, self.died.shape[-1] - 1
        assert placement is not None
        segment = self.timeline.segment.unsqueeze(1).expand(*self.pos.shape[:2], -1)
        segment = segment.gather(-1, self.index.clamp(max=nobody - 1))
        places = placement.places(self.pos, segment)
        index = self.index.masked_fill(self.pos < 0, nobody)
        own = places.new_zeros(self.died.shape).scatter_(-1, index, places)
        N = self.timeline.num_old
        own = own[..., N + begin : N + end].unsqueeze(2).expand(q.shape[:-1])
        turned = placement.turn(q.flatten(2, 3), own.flatten(2)).view(q.shape)
        return turned, placement.turn(self.keys, places)

    def _expire(self, end: int) -> None:
        """Free what no later token sees: an earlier segment, or beyond the layer's own window."""
        if self.plain:
            return
        N, now = self.timeline.num_old, self.timeline.seen[:, end - 1].view(-1, 1, 1)
        last = self.died.shape[-1] - 1
        entry = self.index.clamp(max=last - 1)
        segment = self.timeline.segment.unsqueeze(1).expand(*self.pos.shape[:2], -1)
        gone = segment.gather(-1, entry) != self.timeline.segment[:, N + end - 1].view(-1, 1, 1)
        if self.rule.window is not None:
            gone = gone | (now - self.pos >= self.rule.window)
        self._free(gone & (self.pos >= 0), end - 1)

    def _free(self, gone: Tensor, column: int) -> None:
        nobody = self.died.shape[-1] - 1
        entry = self.index.masked_fill(~gone, nobody)
        self.died.scatter_(-1, entry, column)
        self.pos.masked_fill_(gone, -1)

    def marks_of_entries(self) -> dict[str, Tensor]:
        """(B, H, M): each kept entry's marks."""
        found = {}
        index = self.index.masked_fill(self.pos < 0, self.died.shape[-1] - 1)
        for name, mark in self.marks.items():
            wide = mark.new_zeros(self.died.shape)
            found[name] = wide.scatter_(-1, index, mark)[..., :-1].clone()
        return found
