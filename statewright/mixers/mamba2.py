"""Mamba-2 (Dao and Gu, "Transformers are SSMs", arXiv:2405.21060)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.conv import CausalConv
from statewright.mixers.matrix import (
    GroupedRMSNorm,
    MatrixMixer,
    ScanInputs,
    inverse_softplus_of_steps,
)
from statewright.mixers.resize import (
    after,
    copy_rest,
    in_groups,
    key_energy,
    scaled,
    sources,
    take,
)
from statewright.ops import state_dtype


class Mamba2(MatrixMixer):
    """dt = softplus(dt_raw + bias); a = exp(-dt exp(A_log)); S = a S + B (dt x)^T; y = C S + D x.

    x, y (B, T, D); state S (B, H, K = state_size, V = head_dim), transposed from transformers';
    taps of the convolution over [x | B | C] in `extra`. The output is RMSNorm(y * SiLU(z)), per
    group of channels, then projected. `dt_max` limits dt (the authors' dt_limit), in prefill and
    in single steps alike; transformers limits it in prefill only. Initialisation is the
    authors': A ~ U(1, 16), dt log-uniform in [1e-3, 1e-1], D = 1.

    >>> y, state = Mamba2(8, head_dim=8)(torch.randn(2, 5, 8))
    >>> state
    MatrixState(seen (2,), extra.taps (2, 3, 272), S (2, 2, 128, 8); 22,928 bytes)
    """

    GROWTHS = ("zero", "fresh", "as-released", "copy", "zero-zero")
    RESETS_NORM = ()
    SHRINKS = ("key",)

    has_delta = True

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 128,
        head_dim: int = 64,
        expand: float = 2.0,
        num_groups: int = 1,
        conv_kernel: int = 4,
        dt_min: float = 0.0,
        dt_max: float = float("inf"),
        bias: bool = False,
        conv_bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size, self.inner_size = hidden_size, int(expand * hidden_size)
        if self.inner_size % head_dim:
            raise ValueError(f"mamba2: head_dim={head_dim} does not divide {self.inner_size}")
        self.num_heads, self.num_groups = self.inner_size // head_dim, num_groups
        if self.num_heads % num_groups:
            raise ValueError(f"mamba2: num_groups={num_groups} does not divide {self.num_heads}")
        self.key_size, self.value_size = state_size, head_dim
        self.dt_limit = (dt_min, dt_max)
        self.conv_size = self.inner_size + 2 * num_groups * state_size
        size = self.inner_size + self.conv_size + self.num_heads
        self.in_proj = nn.Linear(hidden_size, size, bias=bias)
        self.conv = CausalConv(self.conv_size, conv_kernel, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupedRMSNorm(self.inner_size, self.inner_size // num_groups, eps)
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(inverse_softplus_of_steps(self.num_heads, 1e-3, 1e-1, 1e-4))
        self.D.fill_(1)

    def project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sizes = [self.inner_size, self.conv_size, self.num_heads]
        z, u, dt = self.in_proj(x).split(sizes, -1)
        return u, (z, dt)

    def gates(self, u: Tensor, rest: tuple[Tensor, Tensor]) -> ScanInputs:
        groups = self.num_groups * self.key_size
        x, B, C = u.split([self.inner_size, groups, groups], -1)
        wide = state_dtype(rest[1].dtype)
        dt = F.softplus(rest[1].to(wide) + self.dt_bias.to(wide))
        if self.dt_limit != (0.0, float("inf")):
            dt = dt.clamp(*self.dt_limit)
        log_a = -dt * self.A_log.to(wide).exp()
        v = x.unflatten(-1, (self.num_heads, -1)) * dt.unsqueeze(-1)
        shape = (self.num_groups, self.key_size)
        return C.unflatten(-1, shape), B.unflatten(-1, shape), v, log_a.unsqueeze(-1)

    def output(self, o: Tensor, u: Tensor, rest: tuple[Tensor, Tensor]) -> Tensor:
        x = u[..., : self.inner_size].unflatten(-1, (self.num_heads, -1))
        y = torch.addcmul(o, x.to(o.dtype), self.D.to(o.dtype).unsqueeze(-1)).flatten(-2)
        gate = F.silu(rest[0].to(y.dtype))
        return self.out_proj(self.norm(y * gate).to(rest[0].dtype))

    def grown(self, factor: Fraction, init: str) -> dict[str, Any]:
        if init == "copy" and factor.denominator != 1:
            raise ValueError(f"mamba2: copy needs a whole factor, got {float(factor):g}")
        return {"state_size": scaled("mamba2", "keys", self.key_size, factor)}

    @torch.no_grad()
    def inherit(self, old: Mamba2, init: str) -> None:
        """d_state x E (StateX, 2026.findings-acl.1073): wider B and C, everything else as it was.

        zero: new C starts at 0, new B at random: the function is preserved and C, then B, learn.
        fresh: all of B and C at random, as the paper says; dt, A and the norm are kept.
        as-released: the authors' code, which also resets dt's bias to 1, A to 1..H, the norm to 1.
        copy, zero-zero: negative controls, which can never use the new keys.
        """
        self._take(old, *sources(old.key_size, self.key_size, init))
        if init == "as-released":
            self.dt_bias.fill_(1)
            self.A_log.copy_(torch.arange(1, self.num_heads + 1).log())
            self.norm.weight.fill_(1)

    def _take(self, old: Mamba2, B: Tensor, C: Tensor) -> None:
        """Rows of in_proj [z | x | B | C | dt] and channels of conv [x | B | C] from `old`."""
        copy_rest(self, old, "in_proj.", "conv.")
        inner, keys = self.inner_size, self.num_groups * old.key_size
        B, C = (in_groups(source, self.num_groups, old.key_size) for source in (B, C))
        x = torch.arange(inner)
        channels = torch.cat([x, after(inner, B), after(inner + keys, C)])
        steps = inner + old.conv_size + torch.arange(self.num_heads)
        rows = torch.cat([x, after(inner, channels), steps])
        take(self.in_proj.weight, old.in_proj.weight, rows)
        take(self.in_proj.bias, old.in_proj.bias, rows)
        take(self.conv.weight, old.conv.weight, channels, zeros=False)
        take(self.conv.bias, old.conv.bias, channels)

    def shrunk(self, factor: Fraction, part: str) -> dict[str, Any]:
        return {"state_size": scaled("mamba2", "keys", self.key_size, factor)}

    def energy(self, x: Tensor, part: str) -> Tensor:
        return key_energy(self, x)

    def keep(self, old: Mamba2, kept: Tensor, part: str) -> None:
        self._take(old, kept, kept)
