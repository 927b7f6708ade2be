"""Mamba, the selective scan (Gu and Dao, arXiv:2312.00752)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.conv import CausalConv
from statewright.mixers.matrix import MatrixMixer, ScanInputs, inverse_softplus_of_steps
from statewright.mixers.resize import after, copy_rest, key_energy, scaled, sources, take
from statewright.policies import Policy
from statewright.state import MatrixState

# log_a is (B, T, inner, state_size): 16 times the activations, so it lives piece by piece.
_PIECE = 64


class Mamba(MatrixMixer):
    """dt = softplus(W dt_raw + b); S = exp(-dt exp(A_log)) S + B (dt x); y = C S + D x (alg. 2).

    x, y (B, T, D); state S (B, H = inner channels, K = state_size, V = 1); taps of the
    convolution over x in `extra`. A decay per channel and state. The initial state is honoured
    in calls of many tokens (transformers 5.23 silently starts those from zero).
    Initialisation is the authors': A_log = log(1..K), dt log-uniform in [1e-3, 1e-1], D = 1.

    >>> y, state = Mamba(8)(torch.randn(2, 5, 8))
    >>> state
    MatrixState(seen (2,), extra.taps (2, 3, 16), S (2, 16, 16, 1); 2,448 bytes)
    """

    value_size = 1
    GROWTHS = ("zero", "fresh", "copy", "zero-zero")
    RESETS_NORM = ()
    SHRINKS = ("key",)
    has_delta = True

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 16,
        expand: float = 2.0,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size, self.inner_size = hidden_size, int(expand * hidden_size)
        self.num_heads, self.key_size = self.inner_size, state_size
        self.dt_rank = math.ceil(hidden_size / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner_size, bias=bias)
        self.conv = CausalConv(self.inner_size, conv_kernel, bias=conv_bias)
        self.x_proj = nn.Linear(self.inner_size, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner_size, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.inner_size, state_size))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.empty(self.inner_size))
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.copy_(torch.arange(1, self.key_size + 1).log().expand_as(self.A_log))
        self.D.fill_(1)
        if not getattr(self.dt_proj.weight, "_is_hf_initialized", False):
            bound = self.dt_rank**-0.5
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
            bias = inverse_softplus_of_steps(self.inner_size, 1e-3, 1e-1, 1e-4)
            self.dt_proj.bias.copy_(bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, -1)
        return u, z

    def gates(self, u: Tensor, rest: Tensor) -> ScanInputs:
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.key_size, self.key_size], -1)
        dt = self.dt_proj(dt)
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)))
        log_a = -dt.unsqueeze(-1) * self.A_log.to(dt.dtype).exp()
        return C.unsqueeze(-2), B.unsqueeze(-2), (dt * u).unsqueeze(-1), log_a

    def scan(
        self,
        u: Tensor,
        rest: Tensor,
        state: MatrixState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, MatrixState]:
        outputs = []
        for begin in range(0, u.shape[1], _PIECE):
            piece = slice(begin, begin + _PIECE)
            flags = [None if f is None else f[:, piece] for f in (mask, starts)]
            o, state = super().scan(u[:, piece], rest[:, piece], state, *flags, policy)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    def output(self, o: Tensor, u: Tensor, rest: Tensor) -> Tensor:
        y = torch.addcmul(o.squeeze(-1), u.to(o.dtype), self.D.to(o.dtype))
        return self.out_proj((y * F.silu(rest.to(y.dtype))).to(rest.dtype))

    def grown(self, factor: Fraction, init: str) -> dict[str, Any]:
        if init == "copy" and factor.denominator != 1:
            raise ValueError(f"mamba: copy needs a whole factor, got {float(factor):g}")
        return {"state_size": scaled("mamba", "keys", self.key_size, factor)}

    def inherit(self, old: Mamba, init: str) -> None:
        """d_state x E, as Mamba-2's inherit; a new key decays like the old one it stands behind.

        Not in the paper. Decays of 1..E K, as a larger model starts with, would give the new
        keys no memory; repeated decays make no copies, since their B differs.
        """
        tiled = torch.arange(self.key_size) % old.key_size
        self._take(old, *sources(old.key_size, self.key_size, init), tiled)

    def _take(self, old: Mamba, B: Tensor, C: Tensor, decays: Tensor) -> None:
        """Rows of x_proj [dt | B | C] and columns of A_log from `old`."""
        copy_rest(self, old, "x_proj.", "A_log")
        B, C = after(self.dt_rank, B), after(self.dt_rank + old.key_size, C)
        take(self.x_proj.weight, old.x_proj.weight, torch.cat([torch.arange(self.dt_rank), B, C]))
        take(self.A_log.T, old.A_log.T, decays)

    def shrunk(self, factor: Fraction, part: str) -> dict[str, Any]:
        return {"state_size": scaled("mamba", "keys", self.key_size, factor)}

    def energy(self, x: Tensor, part: str) -> Tensor:
        return key_energy(self, x)

    def keep(self, old: Mamba, kept: Tensor, part: str) -> None:
        self._take(old, *[kept.flatten()] * 3)
