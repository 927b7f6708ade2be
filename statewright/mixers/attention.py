"""Softmax attention whose state is the list of keys and values (arXiv:1706.03762)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.base import Mixer
from statewright.mixers.kv import bounded, empty_list, extend, marks_of, tidy
from statewright.mixers.lease import refuse_donated, step_in_place, use_up
from statewright.mixers.rope import frequencies, parse_scaling, rotate, turn_by
from statewright.policies import Eviction, Policy, Slots
from statewright.policies.base import victims
from statewright.policies.placement import Placement, check_mode
from statewright.policies.simulate import Rule
from statewright.policies.timeline import Timeline
from statewright.shapes import require
from statewright.state import KVState, State


class Attention(Mixer):
    """o_t = sum_j softmax_j(q_t . k_j / sqrt(Dh)) v_j over the slots kept (arXiv:2401.06104, 3.2).

    A decoder Transformer as a multi-state RNN: the state is one (key, value, position) row per
    token, H = num_kv_heads (grouped queries, arXiv:2305.13245), without end unless a policy bounds
    it or `window` hides (and drops) tokens that are `window` or more positions back. Keys are
    stored rotated by a token's index since its row's reset; with positions="renumbered" or
    "compressed" un-rotated, and turned by their `Placement`. x, y (B, T, D). qk_norm: RMSNorm per
    head before the rotation (Qwen3). Differs from transformers: masked tokens do not exist, so
    nothing depends on the side of the padding.

    >>> y, state = Attention(8)(torch.randn(2, 5, 8))
    >>> state
    KVState(seen (2,), k (2, 4, 5, 2), v (2, 4, 5, 2), pos (2, 4, 5); 976 bytes)
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: str = "none",
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
        positions: str = "original",
    ) -> None:
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv < 1 or num_heads % kv:
            raise ValueError(f"attention: num_kv_heads={kv} does not divide num_heads={num_heads}")
        size = hidden_size // num_heads if head_dim is None else head_dim
        if size < 2 or size % 2:
            raise ValueError(f"attention: head_dim={size}, expected an even number from 2 on")
        if window is not None and window < 1:
            raise ValueError(f"attention: window={window}, expected at least 1 token")
        parse_scaling(rope_scaling)
        self.positions = check_mode(positions, "attention")
        self.hidden_size, self.head_dim, self.window = hidden_size, size, window
        self.num_heads, self.num_kv_heads = num_heads, kv
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.q_proj = nn.Linear(hidden_size, num_heads * size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv * size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv * size, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * size, hidden_size, bias=out_bias)
        self.q_norm = nn.RMSNorm(size, eps=eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(size, eps=eps) if qk_norm else None

    @property
    def rule(self) -> Rule:
        placement = None
        if self.positions != "original":
            turn = turn_by(self.head_dim, self.rope_theta, self.rope_scaling)
            placement = Placement(self.positions, turn)
        return Rule(scale=self.head_dim**-0.5, window=self.window, placement=placement)

    def init_state(self, batch_size: int) -> KVState:
        like, size = self.like, self.head_dim
        return empty_list(batch_size, self.num_kv_heads, size, size, like.dtype, like.device)

    def random_state(self, batch_size: int, generator: torch.Generator) -> KVState:
        """Up to five of the last eight tokens, in any order; every other row lacks one."""
        state = self.init_state(batch_size)
        span = 8 if self.window is None else min(8, self.window - 1)
        N, heads = min(5, span), self.num_kv_heads
        seen = torch.randint(9, 99, (batch_size, 1), generator=generator)
        back = torch.stack([torch.randperm(span, generator=generator)[:N] for _ in seen])
        pos = seen - 1 - back
        if N:
            pos[1::2, 0] = -1
        pos = pos.unsqueeze(1).expand(batch_size, heads, N).contiguous()
        shape = (batch_size, heads, N, self.head_dim)
        k, v = (torch.randn(shape, generator=generator).to(state.k) for _ in range(2))
        empty = (pos < 0).unsqueeze(-1).to(k.device)
        return replace(
            state,
            k=k.masked_fill(empty, 0),
            v=v.masked_fill(empty, 0),
            pos=pos.to(state.pos),
            seen=seen[:, 0].to(state.seen),
        )

    def check(self, state: State, batch_size: int) -> None:
        if not isinstance(state, KVState):
            raise ValueError(f"Attention: state is {state!r}, expected a KVState")
        refuse_donated(state)
        sizes = {"B": batch_size, "H": self.num_kv_heads, "Dh": self.head_dim}
        _, _, N, _ = require("Attention", "state.k", state.k, "B H N Dh", **sizes)
        require("Attention", "state.v", state.v, "B H N Dh", N=N, **sizes)
        del sizes["Dh"]
        require("Attention", "state.pos", state.pos, "B H N", N=N, **sizes)

    def project(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) and pos (B, T) to q (B, H * R, T, Dh) and k, v (B, H, T, Dh).

        q and k are rotated by pos, unless their places are found when they are read.
        """
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.positions != "original":
            return q, k, v
        inverse = frequencies(self.head_dim, self.rope_theta, self.rope_scaling, x.device)
        return rotate(q, pos, inverse), rotate(k, pos, inverse), v

    def step(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, State]:
        """The definition, one token: append, attend to all that is kept, observe, evict.

        donate: as in `forward`; the definition uses the state up without writing to it.
        """
        B, _ = require("Attention", "x", x, "B D", D=self.hidden_size)
        self.check(state, B)
        assert isinstance(state, KVState)
        if donate:
            use_up(state)
        active = torch.ones_like(state.seen, dtype=torch.bool) if mask is None else mask
        pos, seen = state.pos, state.seen
        if reset is not None:
            starts = reset & active
            pos = pos.masked_fill(starts.view(-1, 1, 1), -1)
            seen = seen.masked_fill(starts, 0)
        q, k_t, v_t = self.project(x.unsqueeze(1), seen.unsqueeze(1))
        k, v = torch.cat([state.k, k_t], 2), torch.cat([state.v, v_t], 2)
        new = torch.where(active, seen, -1).view(-1, 1, 1).expand(-1, self.num_kv_heads, 1)
        pos = torch.cat([pos, new], 2)
        q, turned, placement = q.unflatten(1, (self.num_kv_heads, -1)), k, self.rule.placement
        if placement is not None:
            places = placement.places(pos)
            own = places[..., -1:].unsqueeze(-1).expand(q.shape[:-1])
            q = placement.turn(q.flatten(2, 3), own.flatten(2)).view(q.shape).to(k.dtype)
            turned = placement.turn(k, places).to(k.dtype)
        logits = q @ turned.unsqueeze(2).mT
        visible = (pos >= 0).unsqueeze(2)
        weights = self.rule.weights(logits, visible)
        y = self.o_proj((weights @ v.unsqueeze(2)).flatten(1, 3).view(B, -1))
        seen = seen + active
        left = pos >= 0
        marks: dict[str, Tensor] = {}
        if self.window is not None:
            left = left & (seen.view(-1, 1, 1) - pos < self.window)
        if isinstance(policy, Eviction):
            weights = weights * active.view(-1, 1, 1, 1, 1)
            attention = weights, self.rule.peak(logits.detach(), visible)
            left, marks = _evict(policy, state, k, v, pos, left, seen, active, attention)
        return y, tidy(state, k, v, pos, seen, left, marks)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, State]:
        """As `Mixer.forward`. donate: the caller gives the state away, and a single unmasked
        token is then written into its slots instead of a copy.

        Raises ValueError, with the reason, for a state that was donated before.
        """
        state = self.begin(x, state, mask, reset)
        assert isinstance(state, KVState)
        T, eviction = x.shape[1], policy if isinstance(policy, Eviction) else None
        if T == 0:
            return torch.empty_like(x), state
        if donate and T == 1 and reset is None and (mask is None or bool(mask.all())):
            q, k, v = self.project(x, state.seen.unsqueeze(1))
            found = step_in_place(q, k, v, state, self.rule, eviction)
            if found is not None:
                return self.o_proj(found[0].transpose(1, 2).flatten(2)), found[1]
        timeline = Timeline.of(state.pos, state.seen, T, mask, reset)
        q, k, v = self.project(x, timeline.query_pos)
        if donate:
            use_up(state)
        o, state = extend(q, k, v, state, timeline, self.rule, eviction)
        return self.o_proj(o.transpose(1, 2).flatten(2)), state


@torch.no_grad()
def _evict(
    policy: Eviction,
    state: KVState,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    left: Tensor,
    seen: Tensor,
    active: Tensor,
    attention: tuple[Tensor, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is left of the slots after one token under the policy, and their marks."""
    policy = bounded(policy, state, k, v)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    marks = {n: F.pad(m, (0, 1)) for n, m in marks_of(policy, state).items()}
    last = torch.where(active, 0, -1)
    rows, peak = (t.to(wide) for t in attention)
    slots = Slots(k.to(wide), v.to(wide), pos, seen, rows, last, marks, peak)
    marks = policy.observe(slots)
    pos = pos.masked_fill(~left, -1)
    due = (seen % policy.every == 0) & active
    excess = (left.sum(-1) - policy.budget).clamp(min=0) * due.unsqueeze(1)
    slots = replace(slots, pos=pos, marks=marks)
    return left & ~victims(policy, slots, policy.score(slots), excess), marks
