"""minGRU (Feng et al., "Were RNNs All We Needed?", arXiv:2410.01201)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright import ops
from statewright.mixers.base import VectorMixer, advance_seen
from statewright.mixers.resize import in_groups, scaled, share_of, sources, take
from statewright.ops import native, state_dtype
from statewright.policies import Policy
from statewright.policies.recurrent import constant_factors
from statewright.state import State, VectorState

Form = Literal["log", "vanilla"]


def g(x: Tensor) -> Tensor:
    """The paper's positive activation: x + 0.5 for x >= 0, sigmoid(x) below (appendix B.3)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def log_g(x: Tensor) -> Tensor:
    """log g(x) without taking the logarithm of a small number; its gradient at 0 is 2."""
    safe = torch.where(x >= 0, x, torch.zeros_like(x))
    return torch.where(x >= 0, (safe + 0.5).log(), F.logsigmoid(x))


class MinimalMixer(VectorMixer):
    """What minGRU and minLSTM share: the candidate's two forms and the learned initial state.

    `form="log"` is the paper's training form (appendix B): candidate g(W_h x), h > 0.
    `form="vanilla"` is its appendix A: candidate W_h x, h of either sign.
    With `learned_init` the initial state is a parameter p of size inner, N(0, 1) at first; h_0 is
    g(p) in the log form (p is a pre-activation), p in the vanilla form. A carried state is never
    passed through g. Without it, h_0 = 0.
    """

    GROWTHS = ("zero", "fresh")
    RESETS_NORM = ()
    SHRINKS = ("key",)

    def __init__(
        self,
        hidden_size: int,
        num_gates: int,
        expansion: float,
        form: Form,
        learned_init: bool,
        bias: bool,
        offset: float,
    ) -> None:
        super().__init__(hidden_size, num_gates, expansion, bias, offset)
        if form not in ("log", "vanilla"):
            raise ValueError(f"form={form!r}, expected 'log' or 'vanilla'")
        self.form = form
        size = self.inner_size
        self.init_param = nn.Parameter(torch.empty(size)) if learned_init else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init_param is not None:
            nn.init.normal_(self.init_param)

    def candidate(self, c: Tensor) -> Tensor:
        return g(c) if self.form == "log" else c

    def run(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        factors = constant_factors(policy)
        if factors is None or not ops.use_fused(x, state.h):
            return super().run(x, state, mask, starts, policy)
        p = self.in_proj(x)
        if not native.supports(p):
            return super().run(x, state, mask, starts, policy)
        flags = None
        if mask is not None or starts is not None:
            flags = torch.zeros(x.shape[:2], dtype=torch.uint8)
            if mask is not None:
                flags += native.MASKED * ~mask
            if starts is not None:
                flags += native.RESET * starts
        h0, initial = state.h.to(state_dtype(p.dtype)), None
        if starts is not None or torch.is_grad_enabled():
            initial = self.initial()
            # Chosen for no row, yet in the graph: see policies.recurrent.
            h0 = torch.where(torch.zeros(x.shape[0], 1, dtype=torch.bool), initial, h0)
        h, h_T = self.fused(p, h0, initial, flags, factors)
        seen = advance_seen(state.seen, x.shape[1], mask, starts)
        return self.output(h, x), replace(state, h=h_T, seen=seen)

    def fused(
        self,
        p: Tensor,
        h0: Tensor,
        initial: Tensor | None,
        flags: Tensor | None,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        """Gates and scan in one C kernel, on the projection p (B, T, gates * inner)."""
        raise NotImplementedError

    def valid(self, h: Tensor) -> Tensor:
        return g(h) if self.form == "log" else h

    def initial(self) -> Tensor:
        dtype = state_dtype(self.like.dtype)
        if self.init_param is None:
            return self.like.new_zeros(self.inner_size, dtype=dtype)
        return self.candidate(self.init_param.to(dtype))

    def grown(self, factor: Fraction, init: str) -> dict[str, Any]:
        where = type(self).__name__.lower()
        channels = scaled(where, "channels", self.inner_size, factor)
        if channels == self.hidden_size:
            raise ValueError(
                f"{where}: {channels} channels are the model's width, which has no "
                "down-projection; choose another factor"
            )
        return {"expansion": share_of(where, "channels", channels, self.hidden_size)}

    def inherit(self, old: MinimalMixer, init: str) -> None:
        """More channels, which the down-projection does not read at first.

        zero: the function is preserved; the down-projection's new columns, then the new channels,
        learn. Where there was none, an identity is put in its place. fresh: all gates and the
        down-projection at random. Not in the papers.
        """
        if init == "zero":
            channel, reads = sources(old.inner_size, self.inner_size, init)
            self._take(old, channel, reads)

    @torch.no_grad()
    def _take(self, old: MinimalMixer, channel: Tensor, reads: Tensor) -> None:
        """Rows of in_proj (gate by gate) and of the initial state, columns of out_proj."""
        gates = old.in_proj.out_features // old.inner_size
        rows = in_groups(channel, gates, old.inner_size)
        take(self.in_proj.weight, old.in_proj.weight, rows)
        take(self.in_proj.bias, old.in_proj.bias, rows)
        take(self.init_param, old.init_param, channel)
        weight, bias = torch.eye(self.hidden_size).to(self.out_proj.weight), None
        if old.out_proj is not None:
            weight, bias = old.out_proj.weight, old.out_proj.bias
        take(self.out_proj.weight.T, weight.T, reads)
        if self.out_proj.bias is not None:
            self.out_proj.bias.copy_(torch.zeros(self.hidden_size) if bias is None else bias)

    def shrunk(self, factor: Fraction, part: str) -> dict[str, Any]:
        return self.grown(factor, "zero")

    @torch.no_grad()
    def energy(self, x: Tensor, part: str) -> Tensor:
        """E[h^2] times the squared length of what the channel adds to: (1, inner)."""
        log_a, b = self.gates(x)
        h, _ = ops.vector_scan(log_a, b, self.init_state(x.shape[0]).h)
        reach = 1.0 if self.out_proj is None else self.out_proj.weight.square().sum(0)
        return (h.square().mean((0, 1)) * reach).unsqueeze(0)

    def keep(self, old: MinimalMixer, kept: Tensor, part: str) -> None:
        self._take(old, *[kept.flatten()] * 2)


class MinGRU(MinimalMixer):
    """z_t = sigmoid(W_z x_t); h~_t = W_h x_t; h_t = (1 - z_t) h_{t-1} + z_t h~_t (eq. of sec. 3.1).

    x, y (B, T, D); state h (B, inner), inner = expansion * D. `form` and `learned_init` as in
    MinimalMixer. `forget_bias` is added to the initial bias of 1 - z (0 in the paper).
    Differs from the authors' code: the down-projection is left out when inner = D, and the scan
    runs in the linear domain (`ops.default_backend("log")` selects the paper's).

    >>> y, state = MinGRU(8)(torch.randn(2, 5, 8))
    >>> state
    VectorState(seen (2,), h (2, 8); 80 bytes)
    """

    def __init__(
        self,
        hidden_size: int,
        expansion: float = 1.0,
        form: Form = "log",
        learned_init: bool = True,
        forget_bias: float = 0.0,
        bias: bool = True,
    ) -> None:
        self.forget_bias = forget_bias
        super().__init__(hidden_size, 2, expansion, form, learned_init, bias, -forget_bias)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, c = self.project(x)
        return F.logsigmoid(-k), k.sigmoid() * self.candidate(c)

    def fused(
        self,
        p: Tensor,
        h0: Tensor,
        initial: Tensor | None,
        flags: Tensor | None,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        return native.mingru(p, h0, initial, flags, self.form == "log", factors)

    def update(self, x: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
        k, c = self.project(x)
        z = k.sigmoid()
        h = (1 - z) * state.h + z * self.candidate(c)
        return self.output(h, x), replace(state, h=h)
