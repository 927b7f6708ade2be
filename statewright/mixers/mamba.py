"""Mamba, the selective scan (Gu and Dao, arXiv:2312.00752)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.conv import CausalConv
from statewright.mixers.matrix import MatrixMixer, ScanInputs, inverse_softplus_of_steps

# log_a is (B, T, inner, state_size): 16 times the activations, so it lives piece by piece.
_PIECE = 64


class Mamba(MatrixMixer):
    """dt = softplus(W dt_raw + b); S = exp(-dt exp(A_log)) S + B (dt x); y = C S + D x (alg. 2).

    x, y (B, T, D); state S (B, H = inner channels, K = state_size, V = 1); taps of the
    convolution over x in `extra`. A decay per channel and state. The initial state is honoured
    in calls of many tokens (transformers 5.23 silently starts those from zero).
    Initialisation is the authors': A_log = log(1..K), dt log-uniform in [1e-3, 1e-1], D = 1.
    """

    value_size = 1

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
        self, u: Tensor, rest: Tensor, S: Tensor, mask: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for begin in range(0, u.shape[1], _PIECE):
            piece = slice(begin, begin + _PIECE)
            flags = [None if f is None else f[:, piece] for f in (mask, starts)]
            o, S = super().scan(u[:, piece], rest[:, piece], S, *flags)
            outputs.append(o)
        return torch.cat(outputs, 1), S

    def output(self, o: Tensor, u: Tensor, rest: Tensor) -> Tensor:
        y = torch.addcmul(o.squeeze(-1), u.to(o.dtype), self.D.to(o.dtype))
        return self.out_proj((y * F.silu(rest.to(y.dtype))).to(rest.dtype))
