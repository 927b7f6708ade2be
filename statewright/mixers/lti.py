"""What S4D, S4 and H3 share: a time-invariant state space, as a recurrence and as a convolution.

`x_t = A x_{t-1} + b u_t`, `y_t = c x_t + d u_t` for every channel on its own. A, b and c do not
depend on the input, so all outputs are one convolution with the kernel `K_t = c A^t b` (S4,
arXiv:2111.00396, eq. 5), done by FFT; what is carried in and out is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.base import Mixer, advance_seen
from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.ragged import Compaction
from statewright.shapes import require
from statewright.state import MatrixState, State

# Carried states meet the tokens in pieces of this many, so that no power of A is kept per token.
_PIECE = 64


def fft_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution over the last axis: y_t = sum_{s <= t} kernel_s u_{t-s}, T outputs."""
    T = u.shape[-1]
    size = 2 * T
    product = torch.fft.rfft(u, n=size) * torch.fft.rfft(kernel[..., :T], n=size)
    return torch.fft.irfft(product, n=size)[..., :T]


class System(Protocol):
    """A discretised state space of H channels; states are (B, H, N) real."""

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        """A x + b u for one token: x (B, H, N), u (B, H)."""
        ...

    def read(self, x: Tensor) -> Tensor:
        """c x: (B, H)."""
        ...

    def kernel(self, T: int) -> Tensor:
        """c A^t b for t < T: (H, T)."""
        ...

    def inputs(self, T: int) -> Tensor:
        """A^t b for t < T: (H, N, T)."""
        ...

    def outputs(self, T: int) -> Tensor:
        """c A^(t+1) for t < T, as rows: (H, N, T)."""
        ...

    def jump(self, x: Tensor, count: int | Tensor) -> Tensor:
        """A^count x, the count for all rows or one per row (B,)."""
        ...


@dataclass(frozen=True)
class DiagonalSystem:
    """Complex diagonal A = exp(log_a), one of each conjugate pair kept: log_a, b, c (H, M).

    The state's N = 2 M numbers are M complex ones; c x is 2 Re(sum c x).
    """

    log_a: Tensor
    b: Tensor
    c: Tensor

    def advance(self, x: Tensor, u: Tensor) -> Tensor:
        return as_real(self.log_a.exp() * as_complex(x) + self.b * u.unsqueeze(-1))

    def read(self, x: Tensor) -> Tensor:
        return 2 * (self.c * as_complex(x)).sum(-1).real

    def kernel(self, T: int) -> Tensor:
        return 2 * torch.einsum("hm,hmt->ht", self.c * self.b, self._powers(T)).real

    def inputs(self, T: int) -> Tensor:
        return _columns(self.b.unsqueeze(-1) * self._powers(T))

    def outputs(self, T: int) -> Tensor:
        rows = 2 * (self.c * self.log_a.exp()).unsqueeze(-1) * self._powers(T)
        return _columns(rows.conj())

    def jump(self, x: Tensor, count: int | Tensor) -> Tensor:
        power = count if isinstance(count, int) else count.view(-1, 1, 1)
        return as_real((self.log_a * power).exp() * as_complex(x))

    def _powers(self, T: int) -> Tensor:
        """A^t for t < T (H, M, T), by doubling: complex exponentials are slow."""
        powers = torch.ones_like(self.log_a).unsqueeze(-1)
        while (size := powers.shape[-1]) < T:
            powers = torch.cat([powers, powers * (self.log_a * size).exp().unsqueeze(-1)], -1)
        return powers[..., :T]


def as_complex(x: Tensor) -> Tensor:
    """(..., 2 M) real -> (..., M) complex."""
    return from_pairs(x.unflatten(-1, (-1, 2)))


def from_pairs(x: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex; a copy, since a view demands even places in memory."""
    return torch.complex(*x.unbind(-1))


def as_real(x: Tensor) -> Tensor:
    """(..., M) complex -> (..., 2 M) real."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _columns(x: Tensor) -> Tensor:
    """(H, M, T) complex -> (H, 2 M, T) real."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(1, 2)


class StateSpace(nn.Module):
    """H channels, each its own time-invariant state space with N numbers of state.

    A subclass gives `system()`. forward: u (B, T, H), x (B, H, N) -> y (B, T, H), x; masked tokens
    do not exist, a reset empties the state before its token.
    """

    channels: int
    state_size: int
    D: Tensor

    def system(self) -> System:
        """The discretised system, in at least float32."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return state_dtype(self.D.dtype)

    def empty(self, batch_size: int) -> Tensor:
        shape = (batch_size, self.channels, self.state_size)
        return self.D.new_zeros(shape, dtype=self.dtype)

    def update(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The definition, one token: u (B, H) -> y (B, H), x."""
        wide, system = u.to(x.dtype), self.system()
        x = system.advance(x, wide)
        return (system.read(x) + self.D.to(x.dtype) * wide).to(u.dtype), x

    def forward(
        self, u: Tensor, x: Tensor, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = None if mask is None else Compaction.of(mask)
        starts = reset if reset is None or mask is None else reset & mask
        wide = u.to(x.dtype)
        if rows is not None:
            wide = rows.pack(wide)
            starts = None if starts is None else rows.pack(starts)
        y, x = self._run(wide.transpose(1, 2), x, starts, rows)
        y = y.transpose(1, 2) + self.D.to(wide.dtype) * wide
        y = y if rows is None else rows.unpack(y)
        return y.to(u.dtype), x

    def _run(
        self, u: Tensor, x: Tensor, starts: Tensor | None, rows: Compaction | None
    ) -> tuple[Tensor, Tensor]:
        """Piece by piece between the tokens at which some row starts afresh: u (B, H, T)."""
        system, T, cuts = self.system(), u.shape[-1], [0]
        if starts is not None:
            cuts += (starts[:, 1:].any(0).nonzero() + 1).flatten().tolist()
        outputs = []
        for begin, end in zip(cuts, [*cuts[1:], T]):
            if starts is not None:
                x = x.masked_fill(starts[:, begin].view(-1, 1, 1), 0)
            piece = u[..., begin:end]
            y = fft_conv(piece, system.kernel(end - begin))
            # An empty state, with which most training begins, adds nothing.
            if torch.compiler.is_compiling() or x.requires_grad or bool(x.any()):
                y = y + respond(system, x, end - begin)
            outputs.append(y)
            left = None if rows is None else (rows.lengths - begin).clamp(0, end - begin)
            x = finish(system, x, piece, left)
        return torch.cat(outputs, -1), x


def respond(system: System, x: Tensor, T: int) -> Tensor:
    """What the carried state (B, H, N) adds to the next T outputs: (B, H, T)."""
    size = min(T, _PIECE)
    rows, outputs = system.outputs(size), []
    for begin in range(0, T, size):
        outputs.append(torch.einsum("hnt,bhn->bht", rows, x))
        x = system.jump(x, size) if begin + size < T else x
    return torch.cat(outputs, -1)[..., :T]


def finish(system: System, x: Tensor, u: Tensor, lengths: Tensor | None) -> Tensor:
    """The state after u (B, H, T), of which each row has its first `lengths` (B,) tokens."""
    T = u.shape[-1]
    carried = system.jump(x, T if lengths is None else lengths)
    if lengths is not None:
        u = _to_the_right(u, lengths)
    size = min(T, _PIECE)
    u = F.pad(u, (-T % size, 0))
    columns, fresh = system.inputs(size).flip(-1), torch.zeros_like(x)
    for begin in range(0, u.shape[-1], size):
        added = torch.einsum("hnt,bht->bhn", columns, u[..., begin : begin + size])
        fresh = added if begin == 0 else system.jump(fresh, size) + added
    return carried + fresh


def _to_the_right(u: Tensor, lengths: Tensor) -> Tensor:
    """Each row's first tokens moved to its end, zeros before them."""
    T = u.shape[-1]
    at = torch.arange(T, device=u.device) - (T - lengths).unsqueeze(1)
    shifted = u.gather(-1, at.clamp(min=0).unsqueeze(1).expand_as(u))
    return shifted.masked_fill((at < 0).unsqueeze(1), 0)


class StateSpaceMixer(Mixer):
    """y = GLU(W GELU(ssm(x))): the layer of S4 and S4D around their state space.

    x, y (B, T, D); state S (B, H = D channels, K = pairs, V = 2: real and imaginary part).
    """

    ssm: StateSpace

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.out_proj = nn.Linear(hidden_size, 2 * hidden_size)

    def output(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(y)), -1)

    def init_state(self, batch_size: int) -> MatrixState:
        return matrix_state(self.ssm.empty(batch_size))

    def random_state(self, batch_size: int, generator: torch.Generator) -> MatrixState:
        return random_like(self.init_state(batch_size), generator)

    def check(self, state: State, batch_size: int) -> None:
        check_pairs(type(self).__name__, state, self.ssm, batch_size)

    def update(self, x: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
        y, carried = self.ssm.update(x, state.S.flatten(2))
        return self.output(y), replace(state, S=carried.unflatten(2, (-1, 2)))

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        return starts is not None

    def run(
        self,
        x: Tensor,
        state: MatrixState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        y, carried = self.ssm(x, state.S.flatten(2), mask, starts)
        seen = advance_seen(state.seen, x.shape[1], mask, starts)
        return self.output(y), replace(state, S=carried.unflatten(2, (-1, 2)), seen=seen)


def matrix_state(x: Tensor) -> MatrixState:
    """x (B, H, 2 K) as the S (B, H, K, 2) of rows that have seen nothing."""
    seen = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return MatrixState(S=x.unflatten(2, (-1, 2)), seen=seen)


def random_like(state: MatrixState, generator: torch.Generator) -> MatrixState:
    S = torch.randn(state.S.shape, generator=generator).to(state.S)
    seen = torch.randint(1, 99, state.seen.shape, generator=generator).to(state.seen)
    return replace(state, S=S, seen=seen)


def check_pairs(where: str, state: State, ssm: StateSpace, batch_size: int) -> None:
    if not isinstance(state, MatrixState):
        raise ValueError(f"{where}: state is {state!r}, expected a MatrixState")
    sizes = {"B": batch_size, "H": ssm.channels, "K": ssm.state_size // 2, "V": 2}
    require(where, "state.S", state.S, "B H K V", **sizes)


def steps_between(channels: int, low: float, high: float) -> Tensor:
    """log dt, log-uniform in [low, high], of S4's papers."""
    if not 0 < low <= high:
        raise ValueError(f"dt_min={low}, dt_max={high}: expected 0 < dt_min <= dt_max")
    log_low, log_high = torch.tensor(low).log(), torch.tensor(high).log()
    return torch.rand(channels) * (log_high - log_low) + log_low


def require_even(where: str, state_size: int) -> int:
    if state_size < 2 or state_size % 2:
        raise ValueError(f"{where}: state_size={state_size}, expected an even number from 2 on")
    return state_size
