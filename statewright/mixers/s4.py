"""S4, the structured state space: diagonal plus low rank (Gu et al., arXiv:2111.00396)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from statewright.mixers.lti import (
    StateSpace,
    StateSpaceMixer,
    as_complex,
    as_real,
    from_pairs,
    require_even,
    steps_between,
)


@dataclass(frozen=True)
class LowRankSystem:
    """A = diag(L) - p p^*, bilinear with step dt; one of each conjugate pair: L, p, b, c (H, M).

    For a half h of conjugate pairs the whole A is the real-linear map L h - p 2 Re(p^* h), so the
    state's N = 2 M numbers obey a real N x N matrix, which is never inverted (Woodbury).
    """

    L: Tensor
    p: Tensor
    b: Tensor
    c: Tensor
    dt: Tensor
    # (2/dt - A)^-1 as a diagonal and a correction; A, A^2, A^4, ... (H, N, N) real, so far.
    inverse: Tensor = field(init=False)
    correction: Tensor = field(init=False)
    powers: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        inverse = 1 / (2 / self.dt - self.L)
        spread = inverse * self.p
        object.__setattr__(self, "inverse", inverse)
        correction = spread / (1 + _pair_sum(self.p.conj() * spread))
        object.__setattr__(self, "correction", correction)

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """(2/dt - A) x_t = (2/dt + A) x_{t-1} + 2 b u_t (appendix C.2)."""
        h = as_complex(x)
        moved = (2 / self.dt + self.L) * h - self.p * _pair_sum(self.p.conj() * h)
        return as_real(self._solve(moved + 2 * self.b * u.unsqueeze(-1)))

    def _solve(self, r: Tensor) -> Tensor:
        """(2/dt - A)^-1 r."""
        scaled = self.inverse * r
        return scaled - self.correction * _pair_sum(self.p.conj() * scaled)

    def read(self, x: Tensor) -> Tensor:
        return _pair_sum(self.c * as_complex(x)).squeeze(-1)

    def _power(self, exponent: int) -> Tensor:
        """A^(2^exponent)."""
        if not self.powers:
            H, N = self.L.shape[0], 2 * self.L.shape[1]
            eye = torch.eye(N, dtype=self.dt.dtype, device=self.dt.device)
            eye = eye.unsqueeze(1).expand(-1, H, N)
            self.powers.append(self.advance(eye, self.dt.new_zeros(N, H)).movedim(0, -1))
        while len(self.powers) <= exponent:
            self.powers.append(self.powers[-1] @ self.powers[-1])
        return self.powers[exponent]

    def jump(self, x: Tensor, count: int | Tensor) -> Tensor:
        most = count if isinstance(count, int) else int(count.max())
        for bit in range(most.bit_length()):
            if isinstance(count, int):
                if count >> bit & 1:
                    x = _apply(self._power(bit), x)
            else:
                chosen = ((count >> bit) & 1).bool().view(-1, 1, 1)
                x = torch.where(chosen, _apply(self._power(bit), x), x)
        return x

    def inputs(self, T: int) -> Tensor:
        ones = self.dt.new_ones(1, self.L.shape[0])
        first = self.advance(self.dt.new_zeros(1, ones.shape[1], 2 * self.L.shape[1]), ones)[0]
        return self._orbit(first.unsqueeze(-1), T, transposed=False)

    def outputs(self, T: int) -> Tensor:
        row = (self._row.unsqueeze(1) @ self._power(0)).mT
        return self._orbit(row, T, transposed=True)

    @property
    def _row(self) -> Tensor:
        """c as N real numbers."""
        return as_real(2 * self.c.conj())

    def _orbit(self, v: Tensor, T: int, transposed: bool) -> Tensor:
        """v, A v, A^2 v, ... (H, N, T), by doubling."""
        bit = 0
        while v.shape[-1] < T:
            power = self._power(bit)
            v = torch.cat([v, (power.mT if transposed else power) @ v], -1)
            bit += 1
        return v[..., :T]

    def kernel(self, T: int) -> Tensor:
        """The generating function at the T-th roots of unity, Cauchy sums, inverse FFT (alg. 1).

        Everything is multiplied through by 1 + z, so that z = -1 is a node like the others.
        """
        row = self._row
        truncated = as_complex(row - self._transposed_jump(row, T)).conj() / 2
        turn = torch.arange(T // 2 + 1, dtype=self.dt.dtype, device=self.dt.device) / T
        z = torch.polar(torch.ones_like(turn), -2 * torch.pi * turn)
        s, w = (2 / self.dt) * (1 - z), 1 + z
        cauchy = _cauchy(self.L, s, w)
        cb, cp = cauchy(truncated * self.b), cauchy(truncated * self.p)
        pb, pp = cauchy(self.p.conj() * self.b), cauchy(self.p.conj() * self.p)
        spectrum = 2 * (cb - w * cp * pb / (1 + w * pp))
        return torch.fft.irfft(spectrum, n=T)

    def _transposed_jump(self, row: Tensor, count: int) -> Tensor:
        """row A^count, row (H, N)."""
        row = row.unsqueeze(1)
        for bit in range(count.bit_length()):
            if count >> bit & 1:
                row = row @ self._power(bit)
        return row.squeeze(1)


def _cauchy(L: Tensor, s: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    """sum_n v_n / (s - L_n w) over all N modes, those of the conjugates included: (H, nodes)."""
    s, L = s.unsqueeze(1), L.unsqueeze(-1)
    below, above = 1 / (s - L * w), 1 / (s - L.conj() * w)

    def total(v: Tensor) -> Tensor:
        return torch.einsum("hm,hmt->ht", v, below) + torch.einsum("hm,hmt->ht", v.conj(), above)

    return total


def _pair_sum(x: Tensor) -> Tensor:
    """The sum over all modes of what is given for one of each pair: (..., M) -> (..., 1)."""
    return 2 * x.sum(-1, keepdim=True).real


def _apply(A: Tensor, x: Tensor) -> Tensor:
    """A (H, N, N) on x (B, H, N)."""
    return torch.einsum("hij,bhj->bhi", A, x)


def legs(state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as diag(L) - p p^*: L, p, b (M,), the half with positive imaginary parts.

    A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; b_n = sqrt(2n+1). A + p p^T with
    p_n = sqrt(n + 1/2) is -1/2 plus a skew matrix, so a unitary basis diagonalises it (theorem 1).
    """
    n = np.arange(state_size)
    b = np.sqrt(2 * n + 1.0)
    A = -np.tril(np.outer(b, b), -1) - np.diag(n + 1.0)
    p = np.sqrt(n + 0.5)
    skew = A + np.outer(p, p) + 0.5 * np.eye(state_size)
    frequencies, basis = np.linalg.eigh(-1j * skew)
    half = frequencies > 0
    to_basis = basis[:, half].conj().T
    L = -0.5 + 1j * frequencies[half]
    return tuple(torch.from_numpy(np.ascontiguousarray(t)) for t in (L, to_basis @ p, to_basis @ b))


class LowRankSpace(StateSpace):
    """x' = (diag(L) - P P^*) x + B u, y = C x + D u, every channel its own, LegS at first."""

    def __init__(self, channels: int, state_size: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.channels, self.state_size = channels, require_even("s4", state_size)
        self.dt_range = (dt_min, dt_max)
        pairs = (channels, state_size // 2)
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_decay = nn.Parameter(torch.empty(pairs))
        self.frequency = nn.Parameter(torch.empty(pairs))
        self.P, self.B, self.C = (nn.Parameter(torch.empty(*pairs, 2)) for _ in range(3))
        self.D = nn.Parameter(torch.empty(channels))
        for name in ("log_dt", "log_decay", "frequency", "P", "B", "C"):
            getattr(self, name)._no_weight_decay = True
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        L, p, b = legs(self.state_size)
        self.log_dt.copy_(steps_between(self.channels, *self.dt_range))
        self.log_decay.copy_((-L.real).log().expand_as(self.log_decay))
        self.frequency.copy_(L.imag.expand_as(self.frequency))
        self.P.copy_(torch.view_as_real(p).expand_as(self.P))
        self.B.copy_(torch.view_as_real(b).expand_as(self.B))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)

    def system(self) -> LowRankSystem:
        dtype = self.dtype
        L = torch.complex(-self.log_decay.to(dtype).exp(), self.frequency.to(dtype))
        p, b, c = (from_pairs(t.to(dtype)) for t in (self.P, self.B, self.C))
        return LowRankSystem(L, p, b, c, self.log_dt.to(dtype).exp().unsqueeze(-1))


class S4(StateSpaceMixer):
    """y = GLU(W GELU(ssm(x))), ssm diagonal plus low rank (arXiv:2111.00396, algorithm 1).

    x, y (B, T, D); state S (B, H = D, K = state_size / 2, V = 2: real and imaginary part).
    HiPPO-LegS at first, bilinear, A = L - P P^* (the sign of arXiv:2202.09729, always stable).
    `forward` is the convolution by FFT plus what the state carries in; `step` the recurrence.
    Differs from the authors' code: L, P, B are every channel's own; C is learned, and made
    C (1 - A^T) in every call, so that any length works.

    >>> y, state = S4(8)(torch.randn(2, 5, 8))
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
        self.ssm = LowRankSpace(hidden_size, state_size, dt_min, dt_max)

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        # A masked row's jump is as long as the row.
        return mask is not None or starts is not None
