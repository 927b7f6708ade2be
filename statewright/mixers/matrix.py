"""What Mamba-2, GLA and Mamba share: a matrix state, a scan, and an optional convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright import ops
from statewright.mixers.base import Mixer, advance_seen
from statewright.mixers.conv import CausalConv
from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.policies.recurrent import Gates, recurrent_parts, scan
from statewright.shapes import require
from statewright.state import MatrixState, State

_TAPS, _TAPS_AXES = "taps", "batch tap channel"
ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor]


class MatrixMixer(Mixer):
    """`S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`, S (B, H, K, V).

    A subclass gives `project(x) -> (u, rest)`: u is what goes through the convolution and SiLU
    (if there is one), rest what does not; `gates(u, rest) -> (q, k, v, log_a)` with shapes
    (..., G, K), (..., G, K), (..., H, V), (..., H, K or 1); and `output(o, u, rest) -> y`.
    All three work on (B, T, ...) and on (B, ...). `has_delta`: v and log_a are both proportional
    to a step size.
    """

    is_linear = True
    has_delta: bool = False
    num_heads: int
    key_size: int
    value_size: int
    conv: CausalConv | None

    def project(self, x: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def gates(self, u: Tensor, rest: Any) -> ScanInputs:
        raise NotImplementedError

    def output(self, o: Tensor, u: Tensor, rest: Any) -> Tensor:
        raise NotImplementedError

    def init_state(self, batch_size: int) -> MatrixState:
        like = self.like
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        # Not new_zeros: a quantised weight may not know how.
        S = torch.zeros(shape, dtype=state_dtype(like.dtype), device=like.device)
        seen = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return self._with_taps(
            MatrixState(S=S, seen=seen), self.conv and self.conv.init_taps(batch_size)
        )

    def random_state(self, batch_size: int, generator: torch.Generator) -> MatrixState:
        state = self.init_state(batch_size)
        S = torch.randn(state.S.shape, generator=generator).to(state.S)
        seen = torch.randint(1, 99, (batch_size,), generator=generator).to(state.seen)
        state = replace(state, S=S, seen=seen)
        if self.conv is None:
            return state
        taps = state.extra[_TAPS]
        return self._with_taps(state, torch.randn(taps.shape, generator=generator).to(taps))

    def check(self, state: State, batch_size: int) -> None:
        where = type(self).__name__
        if not isinstance(state, MatrixState):
            raise ValueError(f"{where}: state is {state!r}, expected a MatrixState")
        sizes = {"H": self.num_heads, "K": self.key_size, "V": self.value_size}
        require(where, "state.S", state.S, "B H K V", B=batch_size, **sizes)
        if self.conv is not None and _TAPS not in state.extra:
            raise ValueError(f"{where}: state is {state!r}, expected extra {_TAPS!r} (conv taps)")

    def update(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        u, rest = self.project(x)
        taps = None
        if self.conv is not None:
            u, taps = self.conv.update(u, state.extra[_TAPS])
            u = F.silu(u)
        dtype = state.S.dtype
        q, k, v, log_a = (t.to(dtype) for t in self.gates(u, rest))
        groups = (k.shape[1], self.num_heads // k.shape[1])
        inserted = k[:, :, None, :, None] * v.unflatten(1, groups).unsqueeze(3)
        S = log_a.exp().unsqueeze(-1) * state.S + inserted.flatten(1, 2)
        o = (q.unsqueeze(2).unsqueeze(3) @ S.unflatten(1, groups)).flatten(1, 2).squeeze(2)
        y = self.output(o.to(x.dtype), u, rest)
        return y, self._with_taps(replace(state, S=S), taps)

    def run(
        self,
        x: Tensor,
        state: MatrixState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        if x.shape[1] == 1 and not (recurrent_parts(policy) or ops.use_fused(x, state.S)):
            return super().run(x, state, mask, starts, None)
        u, rest = self.project(x)
        taps = None
        if self.conv is not None:
            u, taps = self.conv(u, state.extra[_TAPS], mask, starts)
            u = F.silu(u)
        o, new = self.scan(u, rest, state, mask, starts, policy)
        y = self.output(o, u, rest)
        return y, self._with_taps(new, taps)

    def scan(
        self,
        u: Tensor,
        rest: Any,
        state: MatrixState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, MatrixState]:
        """All tokens at once: what is read and the state after them, `seen` included."""
        q, k, v, log_a = self.gates(u, rest)
        q, k = q.to(v.dtype), k.to(v.dtype)
        gates = Gates(v, log_a, state.seen, q, k, mask, starts, has_delta=self.has_delta)
        o, new = scan(gates, state, policy)
        return o, replace(new, seen=advance_seen(state.seen, u.shape[1], mask, starts))

    def _with_taps(self, state: MatrixState, taps: Tensor | None) -> MatrixState:
        return state if taps is None else state.with_extra(_TAPS, taps, _TAPS_AXES)


class GroupedRMSNorm(nn.Module):
    """x / rms(x) * weight with the mean taken over `size` consecutive channels at a time."""

    def __init__(self, channels: int, size: int, eps: float) -> None:
        super().__init__()
        if channels % size:
            raise ValueError(f"norm: groups of {size} do not divide {channels} channels")
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Mean square in at least float32; returns x's dtype."""
        wide = x.to(state_dtype(x.dtype)).unflatten(-1, (-1, self.size))
        normed = F.rms_norm(wide, (self.size,), eps=self.eps).flatten(-2)
        return (normed * self.weight).to(x.dtype)


def inverse_softplus_of_steps(size: int, low: float, high: float, floor: float) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], at least `floor` (Mamba's dt)."""
    exponent = torch.rand(size) * torch.tensor(high / low).log() + torch.tensor(low).log()
    dt = exponent.exp().clamp(min=floor)
    return dt + (-torch.expm1(-dt)).log()
