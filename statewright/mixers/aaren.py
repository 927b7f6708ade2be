"""Aaren, attention as a recurrent network (Feng et al., arXiv:2405.13956)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from statewright.mixers.base import Mixer, advance_seen
from statewright.ops import state_dtype, vector_scan
from statewright.policies import Policy
from statewright.shapes import require
from statewright.state import State, VectorState

_MAX, _SUM, _AXES = "max", "denominator", "batch head"
# The score of no token: finite, so that its differences are, and below every real one.
_NOTHING = -1e30


class Aaren(Mixer):
    """o_t = sum_{j<=t} softmax_j(q . k_j / sqrt(Dh)) v_j with one learned query per head.

    The query does not depend on the token, so three running numbers per head suffice (sec. 3.1):
    m = max(m', s), c = c' e^(m' - m) + e^(s - m), a = a' e^(m' - m) + v e^(s - m), o = a / c.
    Combining them is associative; with the running maximum known it is one linear scan over a, c.
    x, y (B, T, D); state h = a (B, D), `extra` max and denominator (B, heads). Differs from the
    paper's figure: the query is a parameter after W_q, and there is no output of the query token.

    >>> y, state = Aaren(8)(torch.randn(2, 5, 8))
    >>> state
    VectorState(seen (2,), extra.denominator (2, 4), extra.max (2, 4), h (2, 8); 144 bytes)
    """

    def __init__(self, hidden_size: int, num_heads: int = 4, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"aaren: num_heads={num_heads} does not divide {hidden_size} channels")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads
        self.query = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.in_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query)

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s = q . k / sqrt(Dh) (..., H) and v (..., H, Dh), in at least float32."""
        k, v = self.in_proj(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        dtype = state_dtype(x.dtype)
        return (self.query.to(dtype) * k.to(dtype)).sum(-1) * self.head_dim**-0.5, v.to(dtype)

    def output(self, a: Tensor, c: Tensor, x: Tensor) -> Tensor:
        """a / c, heads joined; where no token was seen c is 0, and the output means nothing."""
        o = a / torch.where(c == 0, torch.ones_like(c), c).unsqueeze(-1)
        return self.out_proj(o.flatten(-2).to(x.dtype))

    def init_state(self, batch_size: int) -> VectorState:
        dtype, shape = state_dtype(self.query.dtype), (batch_size, self.num_heads)
        seen = torch.zeros(batch_size, dtype=torch.long, device=self.query.device)
        state = VectorState(
            h=self.query.new_zeros(batch_size, self.hidden_size, dtype=dtype), seen=seen
        )
        empty = self.query.new_full(shape, _NOTHING, dtype=dtype)
        return _with(state, empty, torch.zeros_like(empty))

    def random_state(self, batch_size: int, generator: torch.Generator) -> VectorState:
        state = self.init_state(batch_size)
        top, total = (torch.randn(state.extra[_MAX].shape, generator=generator) for _ in range(2))
        h = torch.randn(state.h.shape, generator=generator).to(state.h)
        seen = torch.randint(1, 99, (batch_size,), generator=generator).to(state.seen)
        return _with(replace(state, h=h, seen=seen), top.to(h), total.abs().to(h) + 1)

    def check(self, state: State, batch_size: int) -> None:
        names = {_MAX, _SUM}
        if not isinstance(state, VectorState) or not names <= set(state.extra):
            raise ValueError(f"Aaren: state is {state!r}, expected a VectorState with {names}")
        require("Aaren", "state.h", state.h, "B D", B=batch_size, D=self.hidden_size)
        for name in names:
            sizes = {"B": batch_size, "H": self.num_heads}
            require("Aaren", f"state's {name}", state.extra[name], "B H", **sizes)

    def update(self, x: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
        s, v = self.scores(x)
        before, c = state.extra[_MAX], state.extra[_SUM]
        top = torch.maximum(before, s).detach()
        decay, weight = (before - top).exp(), (s - top).exp()
        a = state.h.unflatten(-1, (self.num_heads, -1))
        a = a * decay.unsqueeze(-1) + v * weight.unsqueeze(-1)
        c = c * decay + weight
        return self.output(a, c, x), _with(replace(state, h=a.flatten(1)), top, c)

    def run(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        s, v = self.scores(x)
        if mask is not None:
            s = s.masked_fill(~mask.unsqueeze(-1), _NOTHING)
        first = state.extra[_MAX].unsqueeze(1)
        top = running_max(torch.cat([first, s], 1), starts)
        before, top = torch.cat([first, top[:, 1:-1]], 1), top[:, 1:]
        log_a, weight = before - top, (s - top).exp()
        if mask is not None:
            weight = weight * mask.unsqueeze(-1)
        if starts is not None:
            # The scan forgets there anyway; a rising exponent would overflow its gradient.
            log_a = log_a.masked_fill(starts.unsqueeze(-1), 0)
        b = weight.unsqueeze(-1) * torch.cat([v, torch.ones_like(v[..., :1])], -1)
        log_a = log_a.unsqueeze(-1).expand_as(b)
        h0 = state.h.unflatten(-1, (self.num_heads, -1))
        h0 = torch.cat([h0, state.extra[_SUM].unsqueeze(-1)], -1)
        h, last = vector_scan(log_a.flatten(2), b.flatten(2), h0.flatten(1), starts)
        h, last = (t.unflatten(-1, (self.num_heads, -1)) for t in (h, last))
        y = self.output(h[..., :-1], h[..., -1], x)
        seen = advance_seen(state.seen, x.shape[1], mask, starts)
        new = replace(state, h=last[..., :-1].flatten(1), seen=seen)
        return y, _with(new, top[:, -1], last[..., -1])


@torch.no_grad()
def running_max(s: Tensor, starts: Tensor | None) -> Tensor:
    """The largest s so far, (B, 1 + T, H), begun again where starts (B, T) says.

    Without a gradient: it is a scale that cancels in a / c.
    """
    if starts is None:
        return s.cummax(1).values
    segment = torch.nn.functional.pad(starts.cumsum(1), (1, 0)).unsqueeze(-1)
    reach = 1
    while reach < s.shape[1]:
        same = segment[:, reach:] == segment[:, :-reach]
        wider = torch.where(same, torch.maximum(s[:, reach:], s[:, :-reach]), s[:, reach:])
        s = torch.cat([s[:, :reach], wider], 1)
        reach *= 2
    return s


def _with(state: VectorState, top: Tensor, total: Tensor) -> VectorState:
    return state.with_extra(_MAX, top, _AXES).with_extra(_SUM, total, _AXES)
