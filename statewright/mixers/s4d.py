"""S4D, the diagonal state space (Gu et al., arXiv:2206.11893)."""

from __future__ import annotations

import math

import torch
from torch import nn

from statewright.mixers.lti import (
    DiagonalSystem,
    StateSpace,
    StateSpaceMixer,
    from_pairs,
    require_even,
    steps_between,
)


class DiagonalSpace(StateSpace):
    """x' = diag(A) x + u, y = 2 Re(C x) + D u, zero-order hold: a = exp(dt A), b = (a - 1) / A.

    A = -exp(log_decay) + i frequency per channel and pair, S4D-Lin at first: -1/2 + i pi n. B is 1
    (only its product with C matters), C complex normal, dt per channel (sec. 4 of the paper).
    """

    def __init__(self, channels: int, state_size: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.channels, self.state_size = channels, require_even("s4d", state_size)
        self.dt_range = (dt_min, dt_max)
        pairs = (channels, state_size // 2)
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_decay = nn.Parameter(torch.empty(pairs))
        self.frequency = nn.Parameter(torch.empty(pairs))
        self.C = nn.Parameter(torch.empty(*pairs, 2))
        self.D = nn.Parameter(torch.empty(channels))
        for parameter in (self.log_dt, self.log_decay, self.frequency, self.C):
            parameter._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_dt.copy_(steps_between(self.channels, *self.dt_range))
        self.log_decay.fill_(math.log(0.5))
        self.frequency.copy_(math.pi * torch.arange(self.state_size // 2).expand_as(self.frequency))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)

    def system(self) -> DiagonalSystem:
        dtype = self.dtype
        A = torch.complex(-self.log_decay.to(dtype).exp(), self.frequency.to(dtype))
        log_a = self.log_dt.to(dtype).exp().unsqueeze(-1) * A
        # expm1 has no complex form; |A| >= Re A is far from 0, so the difference is exact enough.
        return DiagonalSystem(log_a, (log_a.exp() - 1) / A, from_pairs(self.C.to(dtype)))


class S4D(StateSpaceMixer):
    """y = GLU(W GELU(ssm(x))), ssm diagonal and time-invariant (S4D-Lin, arXiv:2206.11893).

    x, y (B, T, D); state S (B, H = D, K = state_size / 2, V = 2: real and imaginary part).
    `forward` is the convolution by FFT plus what the state carries in; `step` the recurrence.
    Differs from the authors' code: A and dt are every channel's own, no dropout inside.

    >>> y, state = S4D(8)(torch.randn(2, 5, 8))
    >>> state
    MatrixState(seen (2,), S (2, 8, 32, 2); 4,112 bytes)
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__(hidden_size)
        self.ssm = DiagonalSpace(hidden_size, state_size, dt_min, dt_max)
