"""Policies over linear recurrences: they wrap the scan, so that prefill, chunks and single steps
are one path. A policy may change the gates, what is read and what is carried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statewright.ops import matrix_scan, vector_scan
from statewright.policies.base import Eviction, Policy
from statewright.state import MatrixState, State, VectorState


@dataclass(frozen=True)
class Gates:
    """What T tokens do to a linear recurrence `S_t = exp(log_a_t) S_{t-1} + k_t v_t^T`.

    Matrix: q, k (B, T, G, K), v (B, T, H, V), log_a (B, T, H, K or 1). Vector (q, k None): v, the
    inserted term, and log_a (B, T, D). mask, reset (B, T) bool or None; a reset is never on a
    masked token. seen (B,): tokens of each row before these. initial (D,): the vector state a row
    restarts from. has_delta: v and log_a are both proportional to a step size (Mamba).
    """

    v: Tensor
    log_a: Tensor
    seen: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    mask: Tensor | None = None
    reset: Tensor | None = None
    initial: Tensor | None = None
    has_delta: bool = False

    @property
    def length(self) -> int:
        return self.v.shape[1]

    def counts(self) -> Tensor:
        """(B, T): tokens of the row since its reset, up to and including each."""
        shape = self.v.shape[:2]
        ones = torch.ones(shape, dtype=torch.long, device=self.v.device)
        total = (ones if self.mask is None else self.mask.long()).cumsum(1)
        counts = total + self.seen.unsqueeze(1)
        if self.reset is None:
            return counts
        # Tokens before the last reset at or before each token: total is never decreasing.
        before = torch.where(self.reset, total - 1, -1).cummax(1).values
        return torch.where(before < 0, counts, total - before)

    def piece(self, begin: int, end: int, counts: Tensor | None = None) -> Gates:
        """The tokens from `begin` up to, not including, `end`; counts: `self.counts()` if known."""
        parts = {
            name: tensor[:, begin:end]
            for name in ("v", "log_a", "q", "k", "mask", "reset")
            if (tensor := getattr(self, name)) is not None
        }
        if begin == 0:
            return replace(self, **parts)
        seen = (self.counts() if counts is None else counts)[:, begin - 1]
        return replace(self, seen=seen, **parts)

    def inert(self) -> Gates:
        """Masked tokens as tokens that do nothing: decay 1, nothing inserted."""
        if self.mask is None:
            return self
        ignored = ~self.mask.view(*self.mask.shape, *[1] * (self.v.dim() - 2))
        v, log_a = self.v.masked_fill(ignored, 0), self.log_a.masked_fill(ignored, 0)
        return replace(self, v=v, log_a=log_a, mask=None)


Scan = Callable[[Gates, State], tuple[Tensor, State]]


@dataclass(frozen=True)
class RecurrentPolicy(Policy):
    """Wraps the scan of every linear recurrence: Mamba-2, GLA, Mamba, minGRU, minLSTM.

    >>> sorted(n for n, kind in POLICIES.items() if issubclass(kind, RecurrentPolicy))
    ['deltascale', 'forgetmore', 'statenorm', 'statewindow']
    """

    @property
    def factors(self) -> tuple[float, float] | None:
        """(decay, write) if multiplying both by constants is all that it does."""
        return None

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        """What is read, o (B, T, H, V) or h (B, T, D), and the state after the last token.

        `next_scan` is the plain scan or the next policy's. What this policy remembers stands in
        the state's `extra`; `seen` is the mixer's business.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Policy):
    """Several policies at once, "a+b": the first sees the gates first; at most one evicts.

    >>> policy_spec(Chain((ForgetMore(decay=0.5), Window(budget=8))))
    'forgetmore:decay=0.5+window:budget=8'
    """

    parts: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(isinstance(part, Eviction) for part in self.parts) > 1:
            raise ValueError("policy: at most one part of a chain can bound lists")
        for part in self.parts[:-1]:
            if getattr(part, "innermost", False):
                raise ValueError(f"policy: {part.label} must be the last part of a chain")


def eviction_of(policy: Policy | None) -> Eviction | None:
    """The part that bounds lists of keys and values, if there is one."""
    parts = policy.parts if isinstance(policy, Chain) else (policy,)
    return next((part for part in parts if isinstance(part, Eviction)), None)


def recurrent_parts(policy: Policy | None) -> tuple[RecurrentPolicy, ...]:
    """The parts that wrap a linear recurrence, outermost first."""
    parts = policy.parts if isinstance(policy, Chain) else (policy,)
    return tuple(part for part in parts if isinstance(part, RecurrentPolicy))


def constant_factors(policy: Policy | None) -> tuple[float, float] | None:
    """(decay, write) if all that the recurrent parts do is multiply both by constants, else None.

    A fused kernel that never shows its gates can then do the same.
    """
    decay = write = 1.0
    for part in recurrent_parts(policy):
        if part.factors is None:
            return None
        decay, write = decay * part.factors[0], write * part.factors[1]
    return decay, write


def scan(gates: Gates, state: State, policy: Policy | None = None) -> tuple[Tensor, State]:
    """The scan of a MatrixState or VectorState under the recurrent parts of a policy."""
    run: Scan = _vector if isinstance(state, VectorState) else _matrix
    for part in reversed(recurrent_parts(policy)):
        run = _wrapped(part, run)
    return run(gates, state)


def carried(state: State) -> Tensor:
    """What the recurrence carries: S (B, H, K, V), or h (B, D)."""
    if isinstance(state, MatrixState):
        return state.S
    assert isinstance(state, VectorState)
    return state.h


def with_carried(state: State, value: Tensor) -> State:
    """The state with another S, or h."""
    if isinstance(state, MatrixState):
        return replace(state, S=value)
    assert isinstance(state, VectorState)
    return replace(state, h=value)


def _wrapped(part: RecurrentPolicy, inner: Scan) -> Scan:
    return lambda gates, state: part.scan(inner, gates, state)


def _matrix(gates: Gates, state: State) -> tuple[Tensor, State]:
    gates = gates.inert()
    assert gates.q is not None and gates.k is not None
    o, S = matrix_scan(gates.q, gates.k, gates.v, gates.log_a, carried(state), gates.reset)
    return o, with_carried(state, S)


def _vector(gates: Gates, state: State) -> tuple[Tensor, State]:
    gates, h0 = restarted(gates.inert()), carried(state)
    if gates.initial is not None:
        # Chosen for no row, yet in the graph: otherwise DDP finds a parameter without a gradient
        # as soon as a state is carried.
        none = h0.new_zeros(h0.shape[0], 1, dtype=torch.bool)
        h0 = torch.where(none, gates.initial, h0)
    h, h_T = vector_scan(gates.log_a, gates.v, h0, gates.reset)
    return h, with_carried(state, h_T)


def restarted(gates: Gates) -> Gates:
    """A scan's reset is to zero, so the first decay of a row that restarts adds `initial`."""
    if gates.initial is None or gates.reset is None:
        return gates
    first = gates.v + gates.log_a.exp() * gates.initial
    v = torch.where(gates.reset.unsqueeze(-1), first, gates.v)
    return replace(gates, v=v, initial=None)
