"""Batches from several corpora (a mixture) and of several lengths (a curriculum).

Like `Lanes`, both are pure functions of the step, and any rows of a batch can be had alone: a
rank of many takes its own, and no two overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from statewright.train.data import Batch, Corpus, Lanes


class Batches(Protocol):
    """What training reads: `batch(step, rows)`, a function of its arguments alone."""

    num_lanes: int

    def batch(self, step: int, rows: slice = slice(None)) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Mixture:
    """The rows of several sources, one below the other: a share of the lanes is a weight."""

    parts: tuple[Lanes, ...]

    @property
    def num_lanes(self) -> int:
        return sum(part.num_lanes for part in self.parts)

    @property
    def steps_per_pass(self) -> int:
        """Steps until the first of the sources is read to its end."""
        return min(part.steps_per_pass for part in self.parts)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        begin, end, _ = rows.indices(self.num_lanes)
        found, first = [], 0
        for part in self.parts:
            low, high = max(begin - first, 0), min(end - first, part.num_lanes)
            if low < high:
                found.append(part.batch(step, slice(low, high)))
            first += part.num_lanes
        return Batch(*(torch.cat([getattr(b, n) for b in found]) for n in _FIELDS))


_FIELDS = ("ids", "labels", "reset")


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Phases of other lengths: `phases[i]` from segment `begins[i]` on. Every phase begins anew."""

    begins: tuple[int, ...]
    phases: tuple[Batches, ...]

    @property
    def num_lanes(self) -> int:
        return self.phases[0].num_lanes

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        phase = max(i for i, begin in enumerate(self.begins) if begin <= step)
        return self.phases[phase].batch(step - self.begins[phase], rows)


def lanes_of_weights(weights: Sequence[float], num_lanes: int) -> list[int]:
    """How many lanes each source has: in proportion, by largest remainder, at least one each."""
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights {list(weights)}: expected positive numbers")
    if len(weights) > num_lanes:
        raise ValueError(f"num_lanes={num_lanes}: {len(weights)} sources need a lane each")
    exact = [weight / sum(weights) * num_lanes for weight in weights]
    lanes = [max(1, int(share)) for share in exact]
    while sum(lanes) != num_lanes:
        step = 1 if sum(lanes) < num_lanes else -1
        free = [i for i, count in enumerate(lanes) if count + step > 0]
        lanes[max(free, key=lambda i: step * (exact[i] - lanes[i]))] += step
    return lanes


def make_batches(
    corpora: Sequence[tuple[Corpus, float]],
    num_lanes: int,
    lengths: Sequence[tuple[int, int]],
    seed: int = 0,
) -> Batches:
    """The batches of weighted corpora; lengths are (segment, length) pairs, the first at 0.

    Raises ValueError if a corpus is shorter than its lanes.
    """
    shares = lanes_of_weights([weight for _, weight in corpora], num_lanes)
    phases: list[Batches] = []
    for phase, (_, length) in enumerate(lengths):
        parts = tuple(
            Lanes(corpus, lanes, length, seed, phase) for (corpus, _), lanes in zip(corpora, shares)
        )
        phases.append(parts[0] if len(parts) == 1 else Mixture(parts))
    if len(phases) == 1:
        return phases[0]
    return Curriculum(tuple(begin for begin, _ in lengths), tuple(phases))


def hold_out(corpora: Sequence[Corpus], share: float, most: int) -> tuple[list[Corpus], Corpus]:
    """The corpora without their ends, and these as one corpus of documents.

    Of each the last `share` of the tokens, but no more than `most` of all together.
    """
    share = min(share, most / sum(corpus.num_tokens for corpus in corpora))
    parts = [corpus.split(share) for corpus in corpora]
    ends = [end for _, end in parts if end.num_tokens]
    firsts = np.cumsum([0, *(end.num_tokens for end in ends)])
    held = Corpus(
        np.concatenate([end.tokens for end in ends] or [np.zeros(0, np.uint16)]),
        np.concatenate([end.starts + first for end, first in zip(ends, firsts)] or [[0]]),
        sum(end.num_bytes for end in ends),
    )
    return [first for first, _ in parts], held
