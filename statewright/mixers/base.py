"""What every mixer is: `step` defines it, `forward` is the fast path, both return a state."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.policies.recurrent import Gates, recurrent_parts, scan
from statewright.shapes import require
from statewright.state import State, VectorState


class Mixer(nn.Module):
    """A causal token mixer of width D. A subclass gives `init_state` and `update`.

    `update(x, state) -> (y, state)` is one token of the paper's recurrence, for rows that are
    neither masked nor reset. Masked tokens leave the state and `seen` untouched, wherever in
    the row they stand, and their outputs mean nothing; a reset starts the row afresh before
    its token, unless that token is masked. `is_linear`: recurrent policies apply.

    >>> layer, x = build_mixer("mamba2:head_dim=8", 8), torch.randn(2, 5, 8)
    >>> y, state = layer(x)
    >>> first, later = layer.step(x[:, 0], layer.init_state(2))
    >>> torch.allclose(first, y[:, 0], atol=1e-5)
    True
    """

    hidden_size: int
    is_linear: bool = False
    _like: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Empty, so on the CPU also under torch.device("meta"): weights may be assigned later, and
        # no file holds this.
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)

    @property
    def like(self) -> Tensor:
        """A tensor of this mixer's dtype and device, to make states from.

        A quantised layer has no weight, or one of another dtype, so this is the first parameter
        of 16 bits or more, or else an empty buffer that moves with the mixer.
        """
        for parameter in self.parameters():
            if parameter.is_floating_point() and parameter.element_size() > 1:
                return parameter
        return self._like

    def init_state(self, batch_size: int) -> State:
        """The state of `batch_size` rows that have seen nothing."""
        raise _missing(self, "init_state")

    def random_state(self, batch_size: int, generator: torch.Generator) -> State:
        """A valid state as if some tokens had been seen, for tests of the laws."""
        raise _missing(self, "random_state")

    def update(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token for every row: x (B, D) -> y (B, D) and the next state, `seen` unchanged."""
        raise _missing(self, "update")

    def step(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, State]:
        """The definition: one token x (B, D), with mask and reset (B,) bool, -> y (B, D), state.

        An `Eviction` policy bounds a list of keys and values and leaves recurrent mixers
        untouched, here and in `forward`; a `RecurrentPolicy` wraps the scan of linear ones, so
        that a step under it is a call with one token.
        """
        B, _ = require(type(self).__name__, "x", x, "B D", D=self.hidden_size)
        if self.is_linear and recurrent_parts(policy):
            flags = (None if f is None else f.unsqueeze(1) for f in (mask, reset))
            y, new = self.forward(x.unsqueeze(1), state, *flags, policy)
            return y.squeeze(1), new
        self.check(state, B)
        if reset is not None:
            starts = reset if mask is None else reset & mask
            state = self.init_state(B).where(starts, state)
        y, new = self.update(x, state)
        new = replace(new, seen=state.seen + 1)
        return y, new if mask is None else new.where(mask, state)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, State]:
        """Many tokens: x (B, T, D), mask and reset (B, T) bool -> y (B, T, D) and the state.

        Equals folding `step` over the tokens (law 1); T = 0 returns the state as it is.
        Raises ValueError for shapes that do not fit this mixer.
        """
        state = self.begin(x, state, mask, reset)
        if x.shape[1] == 0:
            return torch.empty_like(x), state
        starts = reset if reset is None or mask is None else reset & mask
        if torch.compiler.is_compiling() and self.run_cuts(mask, starts):
            return Mixer.run(self, x, state, mask, starts, policy)
        return self.run(x, state, mask, starts, policy)

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        """Whether `run` cuts or packs tokens where the data say, which a compiled graph cannot;
        it goes token by token then."""
        return False

    def run(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        """The fast path of `forward` for checked arguments and T > 0; here `step` by `step`.

        starts (B, T): the resets that count, those of unmasked tokens.
        """
        if self.is_linear and recurrent_parts(policy):
            raise ValueError(
                f"{type(self).__name__}: policy={policy!r} wraps a scan, and this mixer's `run` "
                "has none: expected a `run` of its own that applies it, or is_linear = False"
            )
        outputs = []
        for t in range(x.shape[1]):
            at_t = [None if flags is None else flags[:, t] for flags in (mask, starts)]
            y, state = self.step(x[:, t], state, *at_t)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    def begin(
        self, x: Tensor, state: State | None, mask: Tensor | None, reset: Tensor | None
    ) -> State:
        """Check the arguments of `forward`; the state to begin with."""
        name = type(self).__name__
        B, T, _ = require(name, "x", x, "B T D", D=self.hidden_size)
        for label, flags in (("mask", mask), ("reset", reset)):
            if flags is not None:
                require(name, label, flags, "B T", B=B, T=T)
        if state is None:
            return self.init_state(B)
        self.check(state, B)
        return state

    def check(self, state: State, batch_size: int) -> None:
        """Raise ValueError if the state is not one of this mixer's for that many rows."""
        raise _missing(self, "check")


def _missing(mixer: Mixer, method: str) -> NotImplementedError:
    return NotImplementedError(f"{type(mixer).__name__} has no method {method!r} of its own")


def inner_size(hidden_size: int, expansion: float) -> int:
    """Channels of the state, rounded down; ValueError unless that is a number from 1 on."""
    size = hidden_size * expansion
    if not 1 <= size < float("inf"):
        raise ValueError(f"expansion={expansion}: {hidden_size} channels become {size}")
    return int(size)


def advance_seen(seen: Tensor, T: int, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """`seen` (B,) after T more tokens: counts unmasked tokens, from each row's last reset on."""
    if mask is None and reset is None:
        return seen + T
    counted = torch.ones_like(reset) if mask is None else mask
    if reset is None:
        return seen + counted.sum(1)
    starts = reset & counted
    since = starts.flip(1).cumsum(1).flip(1) - starts.long()
    return torch.where(starts.any(1), 0, seen) + (counted & (since == 0)).sum(1)


class GateProjection(nn.Linear):
    """All gates in one Linear; `offset` is part of the first gate's initial bias.

    It is the projection's own business because transformers initialises every module again that
    has parameters, and no other: a mixer without any could not add it afterwards.
    """

    def __init__(
        self, hidden_size: int, num_gates: int, inner_size: int, bias: bool, offset: float
    ) -> None:
        self.inner_size, self.offset = inner_size, offset
        super().__init__(hidden_size, num_gates * inner_size, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        loaded = getattr(self.bias, "_is_hf_initialized", False)
        if self.offset and self.bias is not None and not loaded:
            self.bias[: self.inner_size] += self.offset


class VectorMixer(Mixer):
    """`h_t = a_t * h_{t-1} + b_t` with gates that depend on x_t alone: a scan over tokens.

    A subclass gives `gates(x) -> (log_a, b)` (used by `forward`) and `update` (the definition).
    `inner_size` is D times the expansion; a down-projection follows when the two differ.

    >>> [name for name, kind in MIXERS.items() if issubclass(kind, VectorMixer)]
    ['mingru', 'minlstm']
    """

    is_linear = True

    def __init__(
        self, hidden_size: int, num_gates: int, expansion: float, bias: bool, offset: float
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.inner_size = inner_size(hidden_size, expansion)
        self.in_proj = GateProjection(hidden_size, num_gates, self.inner_size, bias, offset)
        down = self.inner_size != hidden_size
        self.out_proj = nn.Linear(self.inner_size, hidden_size, bias=bias) if down else None

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log_a and b (B, T, inner), in at least float32."""
        raise _missing(self, "gates")

    def initial(self) -> Tensor:
        """The state before the first token: (inner,), in the state's dtype."""
        raise _missing(self, "initial")

    def project(self, x: Tensor) -> list[Tensor]:
        """The gates' pre-activations, each (..., inner), in at least float32."""
        p = self.in_proj(x)
        return list(p.to(state_dtype(p.dtype)).chunk(p.shape[-1] // self.inner_size, -1))

    def output(self, h: Tensor, x: Tensor) -> Tensor:
        h = h.to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h)

    def init_state(self, batch_size: int) -> VectorState:
        initial = self.initial()
        seen = torch.zeros(batch_size, dtype=torch.long, device=initial.device)
        return VectorState(h=initial.expand(batch_size, -1), seen=seen)

    def random_state(self, batch_size: int, generator: torch.Generator) -> VectorState:
        state = self.init_state(batch_size)
        h = torch.randn(state.h.shape, generator=generator).to(state.h)
        seen = torch.randint(1, 99, (batch_size,), generator=generator).to(state.seen)
        return replace(state, h=self.valid(h), seen=seen)

    def valid(self, h: Tensor) -> Tensor:
        """Map any h to one this mixer can reach (the positive form: to h > 0)."""
        return h

    def check(self, state: State, batch_size: int) -> None:
        if not isinstance(state, VectorState):
            raise ValueError(f"{type(self).__name__}: state is {state!r}, expected a VectorState")
        sizes = {"B": batch_size, "D": self.inner_size}
        require(type(self).__name__, "state.h", state.h, "B D", **sizes)

    def run(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        T = x.shape[1]
        if T == 1 and not recurrent_parts(policy):
            if torch.is_grad_enabled():
                state = replace(state, h=self._with_initial(state.h))
            return super().run(x, state, mask, starts, None)
        log_a, b = self.gates(x)
        gates = Gates(b, log_a, state.seen, mask=mask, reset=starts, initial=self.initial())
        h, new = scan(gates, state, policy)
        return self.output(h, x), replace(new, seen=advance_seen(state.seen, T, mask, starts))

    def _with_initial(self, h: Tensor) -> Tensor:
        """h itself, with a learned initial state in its graph although no row starts.

        Otherwise DDP finds a parameter without a gradient as soon as a state is carried.
        """
        return torch.where(h.new_zeros(h.shape[0], 1, dtype=torch.bool), self.initial(), h)
