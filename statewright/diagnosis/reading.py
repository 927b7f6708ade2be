"""One reading of one text: losses by position, and what the states looked like on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.intervene import retention_by_change
from statewright.diagnosis.runner import Runner
from statewright.diagnosis.schedule import Schedule, rows_at, schedule_for
from statewright.diagnosis.stream import Bucket, Layer, Stream, Typical
from statewright.intervals import estimate
from statewright.policies import Policy, policy_spec

Advance = Callable[[int], None]
# Layers without visible gates whose retention is found by changing their states: the fastest
# growing ones, since each costs a reading of one training length.
_CHANGED_LAYERS = 4


@dataclass(frozen=True)
class Comparison:
    """The same tokens of one octave, read after everything before them and from an empty state
    (at least half a training length before them): the mean of both losses in nats, half the 95 %
    intervals of their difference and of the latter, over how many tokens."""

    begin: int
    end: int
    carried: float
    fresh: float
    error: float
    fresh_error: float
    tokens: int


@dataclass(frozen=True)
class Reading:
    """What `read` found; in_window: the loss of texts of the training length, and half its 95 %
    interval."""

    policy: str
    train_length: int
    length: int
    num_rows: int
    in_window: float
    in_window_error: float
    inside: tuple[Bucket, ...]
    buckets: tuple[Bucket, ...]
    comparisons: tuple[Comparison, ...]
    probes: tuple[int, ...]
    watches: tuple[int, ...]
    layers: tuple[Layer, ...]
    has_attention: bool


@torch.no_grad()
def read(
    host: Any,
    ids: Tensor,
    train_length: int,
    policy: Policy | str | None = None,
    advance: Advance = lambda tokens: None,
) -> Reading:
    """Read ids (B, N), any integer type, in one go and in windows, and look at the states.

    `host` is ours or a `ForeignModel` in evaluation mode. Memory does not depend on N.
    `advance(tokens)` after every call. Raises ValueError for a text of less than two training
    lengths, a model without recurrent layers, a policy on a model that is not ours, and states or
    losses that are not finite, naming layer, head and token.
    """
    run = Runner(host, policy)
    schedule = schedule_for(ids, train_length, run.vocab_size)
    stream = Stream(run, ids, schedule)
    for call in schedule.calls():
        stream.read(call)
        advance(call.end - call.begin)
    typical = Typical()
    windows = rows_at(ids, schedule.first_windows(), train_length + 1)
    first = run.windows(windows, typical.look)
    return Reading(
        policy=policy_spec(run.policy),
        train_length=train_length,
        length=schedule.length,
        num_rows=ids.shape[0],
        in_window=float(first.mean()),
        in_window_error=_error(first),
        inside=_inside(first),
        buckets=tuple(stream.buckets()),
        comparisons=tuple(_compare(run, ids, schedule, stream)),
        probes=tuple(schedule.probes),
        watches=tuple(schedule.watches) if run.names else (),
        layers=_with_retention(run, ids, stream, tuple(stream.layers(typical))),
        has_attention=stream.has_attention,
    )


def _inside(first: Tensor) -> tuple[Bucket, ...]:
    """Log buckets of losses (windows, T): by position inside the training length."""
    T = first.shape[1]
    edges = [0, *(2**i for i in range(T.bit_length()) if 2**i < T), T]
    return tuple(
        Bucket(a, b, float(part.mean()), _error(part), part.numel())
        for a, b in zip(edges, edges[1:])
        for part in (first[:, a:b],)
    )


def _compare(run: Runner, ids: Tensor, schedule: Schedule, stream: Stream) -> Iterator[Comparison]:
    T = schedule.train_length
    for number in range(schedule.num_octaves):
        starts = schedule.windows(number)
        if not starts:
            continue
        fresh = run.windows(rows_at(ids, starts, T + 1))[:, T // 2 :]
        carried = stream.losses_at(starts)
        begin, end = schedule.octave(number)
        yield Comparison(
            begin,
            end,
            float(carried.mean()),
            float(fresh.mean()),
            _error(carried - fresh),
            _error(fresh),
            carried.numel(),
        )


def _error(values: Tensor) -> float:
    """Half the 95 % interval of the mean of values (windows, tokens): windows are drawn, tokens
    are not; of one window, the tokens are all there is to go by."""
    drawn = values.mean(1) if values.shape[0] > 1 else values.flatten()
    return estimate(drawn.tolist()).margin


def _with_retention(
    run: Runner, ids: Tensor, stream: Stream, layers: tuple[Layer, ...]
) -> tuple[Layer, ...]:
    """The retention of the layers that grew most among those whose gates nobody sees."""
    hidden = [layer for layer in layers if layer.retention is None]
    hidden = sorted(hidden, key=lambda layer: -max(layer.growth))[:_CHANGED_LAYERS]
    if not hidden:
        return layers
    T = stream.schedule.train_length
    names = [layer.name for layer in hidden]
    found = retention_by_change(run, stream.trained, ids[:, T : 2 * T], names)
    return tuple(
        replace(layer, retention=found.get(layer.name, layer.retention)) for layer in layers
    )
