"""State passing: what a lane's state is before a step's segments, and summed loss over them.

| initial    | a lane begins from                                                               |
|------------|----------------------------------------------------------------------------------|
| `previous` | its own last state, over `num_segments` segments (0: to the document's end)      |
| `zero`     | the model's initial state, every time                                            |
| `other`    | the last state of another lane: lanes change places in pairs                     |
| `noise`    | a normal draw with the lanes' mean and deviation, element by element, within      |
|            | their range                                                                      |

`reset_share` of the lanes, drawn from (seed, step), begin from the initial state all the same.
The first and the last are "state passing" and "fitted noise" of arXiv:2507.02782; `previous` is
truncated backpropagation through time. The state is detached before the step, never within it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.ops import state_dtype
from statewright.state import KVState, ModelState, State, cat
from statewright.train.config import TrainConfig
from statewright.train.data import IGNORED, Batch


def begin_step(
    state: ModelState, reset: Tensor, config: TrainConfig, step: int, rows: slice
) -> tuple[ModelState, Tensor]:
    """The state before a step and its first segment's resets (B, T), for `rows` of the lanes.

    Draws are made for all lanes and cut, so that they do not depend on who trains which.
    """
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 2 + 1)
    fresh = torch.rand(config.num_lanes, generator=generator)[rows] < config.reset_share
    chain = config.num_segments // config.gradient_segments
    if chain and step % chain == 0:
        fresh = torch.ones_like(fresh)
    fresh, first = fresh.to(reset.device), reset[:, 0]
    if config.initial == "zero":
        first = torch.ones_like(fresh)
    elif config.initial == "previous":
        first = first | fresh
    else:
        # The state is another's anyway: what the lane's own text does at this token is no matter.
        first = fresh
    if config.initial == "other":
        state = state.rows(torch.arange(state.batch_size) ^ 1)
    if config.initial == "noise":
        state = fitted_noise(state, config, generator, rows)
    return state, torch.cat([first.unsqueeze(1), reset[:, 1:]], 1)


def fitted_noise(
    state: ModelState, config: TrainConfig, generator: torch.Generator, rows: slice
) -> ModelState:
    """Independent normal draws, element by element, as the rows of `state` are distributed."""

    def draw(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        noise = torch.randn(config.num_lanes, *t.shape[1:], generator=generator)[rows]
        drawn = t.mean(0) + t.std(0, correction=0) * noise.to(t)
        # Within the range: what only a positive state can be stays positive.
        return drawn.clamp(t.amin(0), t.amax(0))

    return state.map(draw)


def check_passing(state: ModelState, config: TrainConfig, num_rows: int) -> None:
    """ValueError if this model's state cannot be passed on in the configured way."""
    if config.initial == "other" and num_rows % 2:
        raise ValueError(
            f"initial=other changes places in pairs, but a process has {num_rows} lanes"
        )
    if config.initial == "noise" and any(isinstance(layer, KVState) for layer in state.layers):
        raise ValueError("initial=noise: the keys and values of attention are no vector to draw")


class Objective(nn.Module):
    """Summed loss of consecutive segments, the state carried from one to the next with gradient.

    Everything that is differentiated happens in this one call, so that it can be wrapped as a
    whole. `initial`: a state to be learned, which every lane begins from.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, initial: LearnedState | None) -> None:
        super().__init__()
        self.model, self.initial = model, initial
        self.options = {} if config.policy == "none" else {"policy": config.policy}
        self.bfloat16, self.cached = config.dtype == "bfloat16", config.parallel != "sharded"

    def forward(self, segments: Sequence[Batch], state: ModelState) -> tuple[Tensor, ModelState]:
        total = torch.zeros((), device=segments[0].ids.device)
        if self.initial is not None:
            state = self.initial.state().rows([0] * state.batch_size)
        for batch in segments:
            # Sharded weights are gathered again and again: a cache of casts would keep them all.
            with torch.autocast(
                total.device.type,
                torch.bfloat16,
                enabled=self.bfloat16,
                cache_enabled=self.cached,
            ):
                out = self.model(batch.ids, state=state, reset=batch.reset, **self.options)
            logits = out.logits.flatten(0, 1)
            logits = logits.to(state_dtype(logits.dtype))
            total = total + F.cross_entropy(
                logits, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            state = out.state
        return total, state


class LearnedState(nn.Module):
    """The state that rows begin from, as parameters: one row of a model's initial state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.like = model.init_state(1).detach()
        if any(isinstance(layer, KVState) for layer in self.like.layers):
            raise ValueError("train_only=state: attention begins with no keys to be learned")
        self.values = nn.ParameterList(
            nn.Parameter(t.clone()) for _, t in self.like.items() if t.is_floating_point()
        )

    def state(self) -> ModelState:
        """The state itself, one row, with gradient."""
        values = iter(self.values)
        named = {n: next(values) if t.is_floating_point() else t for n, t in self.like.items()}
        return self.like.with_tensors(named)

    def load(self, state: State) -> None:
        """Take over another state's values, exactly; ValueError if it is not of this model."""
        fitting = self.like.with_tensors(dict(state.items()))
        kept = [t for _, t in fitting.items() if t.is_floating_point()]
        with torch.no_grad():
            for value, tensor in zip(self.values, kept, strict=True):
                value.copy_(tensor)


def first_documents(segments: Sequence[Batch]) -> list[Batch]:
    """For rows that begin from a learned state: only what follows from it has targets.

    A reset further on begins from the model's own initial state.
    """
    reset = torch.cat([batch.reset for batch in segments], 1)
    reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], 1)
    later, lengths = reset.cumsum(1) > 0, [batch.ids.shape[1] for batch in segments]
    parts = zip(segments, reset.split(lengths, 1), later.split(lengths, 1))
    return [Batch(b.ids, b.labels.masked_fill(gone, IGNORED), r) for b, r, gone in parts]


def join_rows(states: Sequence[State]) -> State:
    """As `state.cat`; lists of keys and values of unequal length are padded with empty slots."""
    if len(states) == 1:
        return states[0]
    sizes = [dict(_slots(s)) for s in states]
    longest = {name: max(size[name] for size in sizes) for name in sizes[0]}
    return cat([_padded(s, longest) for s in states])


def _slots(state: State) -> list[tuple[str, int]]:
    return [(n, t.shape[axes.index("slot")]) for n, t, axes in state.named() if "slot" in axes]


def _padded(state: State, longest: dict[str, int]) -> State:
    tensors = {}
    for name, tensor, axes in state.named():
        if name in longest:
            axis = axes.index("slot")
            missing = list(tensor.shape)
            missing[axis] = longest[name] - tensor.shape[axis]
            empty = -1 if name.rpartition(".")[2] == "pos" else 0
            tensor = torch.cat([tensor, tensor.new_full(missing, empty)], axis)
        tensors[name] = tensor
    return _with(state, tensors)


def _with(state: State, tensors: dict[str, Tensor]) -> State:
    """As `with_tensors`, of other sizes."""
    replaced = iter(tensors.values())
    return state.map(lambda _: next(replaced))
