"""H3, two state spaces between three projections (Fu et al., arXiv:2212.14052)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from statewright.mixers.base import Mixer, advance_seen
from statewright.mixers.conv import CausalConv
from statewright.mixers.lti import fft_conv, matrix_state, random_like
from statewright.mixers.s4d import DiagonalSpace
from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.shapes import require
from statewright.state import MatrixState, State

_TAPS, _TAPS_AXES = "taps", "batch tap channel"


class ShiftSpace(CausalConv):
    """The shift state space: its state is the last inputs themselves, so it is a convolution."""

    def _convolve(
        self, x: Tensor, taps: Tensor, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if reset is not None:
            return super()._convolve(x, taps, reset, lengths)
        padded = torch.cat([taps, x], 1)
        wide = padded.to(state_dtype(x.dtype)).mT
        kernel = self.weight.flip(-1).to(wide.dtype)
        y = fft_conv(wide, nn.functional.pad(kernel, (0, wide.shape[-1] - self.width))).mT
        return y[:, self.width - 1 :].to(x.dtype), self._last_taps(padded, None, lengths)


class H3(Mixer):
    """o = W_o (q * diag(shift(k) * v)): k shifted, multiplied with v, remembered, read by q.

    q, k, v are projections of x; `shift` a state space of the last `shift_size` keys, `diag` an
    S4D over the outer product k v^T of each head (arXiv:2212.14052, algorithm 1). x, y (B, T, D);
    state S (B, head_dim^2 * heads, K = state_size / 2, V = 2: real and imaginary part), the last
    keys in `extra["taps"]`. Differs from the authors' code: the shift's weights start uniform, as
    our other convolutions, and it has no separate skip (which is one of its weights).

    >>> y, state = H3(8)(torch.randn(2, 5, 8))
    >>> state
    MatrixState(seen (2,), extra.taps (2, 63, 8), S (2, 8, 32, 2); 8,144 bytes)
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        head_dim: int = 1,
        shift_size: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if head_dim < 1 or hidden_size % head_dim:
            raise ValueError(f"h3: head_dim={head_dim} does not divide {hidden_size} channels")
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.shift = ShiftSpace(hidden_size, shift_size, bias=False)
        self.ssm = DiagonalSpace(hidden_size // head_dim, state_size, dt_min, dt_max)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def init_state(self, batch_size: int) -> MatrixState:
        x = self.ssm.empty(batch_size * self.head_dim**2)
        state = matrix_state(x.unflatten(0, (batch_size, -1)).flatten(1, 2))
        return state.with_extra(_TAPS, self.shift.init_taps(batch_size), _TAPS_AXES)

    def random_state(self, batch_size: int, generator: torch.Generator) -> MatrixState:
        state = random_like(self.init_state(batch_size), generator)
        taps = state.extra[_TAPS]
        taps = torch.randn(taps.shape, generator=generator).to(taps)
        return state.with_extra(_TAPS, taps, _TAPS_AXES)

    def check(self, state: State, batch_size: int) -> None:
        if not isinstance(state, MatrixState) or _TAPS not in state.extra:
            raise ValueError(f"H3: state is {state!r}, expected a MatrixState with {_TAPS!r}")
        heads = self.hidden_size * self.head_dim
        sizes = {"B": batch_size, "H": heads, "K": self.ssm.state_size // 2, "V": 2}
        require("H3", "state.S", state.S, "B H K V", **sizes)
        sizes = {"B": batch_size, "tap": self.shift.width - 1, "D": self.hidden_size}
        require("H3", f"state's {_TAPS}", state.extra[_TAPS], "B tap D", **sizes)

    def update(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        q, k, v = self.in_proj(x).chunk(3, -1)
        k, taps = self.shift.update(k, state.extra[_TAPS])
        kv, carried = self.ssm.update(self._outer(k, v).flatten(0, 1), self._carried(state))
        kv = kv.unflatten(0, (x.shape[0], -1))
        return self._read(q, kv), self._with(state, carried, taps)

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        return starts is not None

    def run(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        B, T, _ = x.shape
        q, k, v = self.in_proj(x).chunk(3, -1)
        k, taps = self.shift(k, state.extra[_TAPS], mask, starts)
        kv = self._outer(k, v).movedim(2, 1).flatten(0, 1)
        copies = self.head_dim**2
        flags = (None if f is None else f.repeat_interleave(copies, 0) for f in (mask, starts))
        kv, carried = self.ssm(kv, self._carried(state), *flags)
        y = self._read(q, kv.unflatten(0, (B, -1)).movedim(1, 2))
        seen = advance_seen(state.seen, T, mask, starts)
        return y, replace(self._with(state, carried, taps), seen=seen)

    def _outer(self, k: Tensor, v: Tensor) -> Tensor:
        """k v^T of every head: (..., D), (..., D) -> (..., head_dim^2, heads)."""
        k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(-1, -2) for t in (k, v))
        return (k.unsqueeze(-2) * v.unsqueeze(-3)).flatten(-3, -2)

    def _read(self, q: Tensor, kv: Tensor) -> Tensor:
        """q^T (k v^T) of every head, joined and projected: (..., D)."""
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(-1, -2)
        o = (q.unsqueeze(-2) * kv.unflatten(-2, (self.head_dim, -1))).sum(-3)
        return self.out_proj(o.transpose(-1, -2).flatten(-2))

    def _carried(self, state: MatrixState) -> Tensor:
        """S as the state of one state space per key and value index: (B * head_dim^2, heads, N)."""
        return state.S.flatten(2).unflatten(1, (-1, self.ssm.channels)).flatten(0, 1)

    def _with(self, state: MatrixState, carried: Tensor, taps: Tensor) -> MatrixState:
        S = carried.unflatten(0, (taps.shape[0], -1)).flatten(1, 2).unflatten(2, (-1, 2))
        return replace(state, S=S).with_extra(_TAPS, taps, _TAPS_AXES)
