"""Recorded behaviour: episodes as one stream of steps, and windows of it as training batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from statewright.studies.rl.scores import ControlTask


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode of T steps: observations (T + 1, O), the last after the last action.

    actions (T, A), rewards (T,). terminated: the task ended it; else a time limit did.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True, eq=False)
class Windows:
    """A training batch: togo (B, T), observations (B, T, O), actions (B, T, A), starts (B, T).

    starts is true at an episode's first step, where the state is reset.
    """

    togo: Tensor
    observations: Tensor
    actions: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> Windows:
        parts = (self.togo, self.observations, self.actions, self.starts)
        return Windows(*(part.to(device) for part in parts))


@dataclass(frozen=True, eq=False)
class Recording:
    """Whole episodes after each other: observations (N, O), actions (N, A), rewards (N,), float32.

    starts (N,) bool: the first step of each episode. Raises ValueError for lengths that differ,
    numbers that are not finite, or no step at all.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    starts: np.ndarray

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__annotations__}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"recording: numbers of steps differ: {lengths}")
        if not len(self.rewards) or not self.starts[0]:
            raise ValueError("recording: no whole episode")
        for name in ("observations", "actions", "rewards"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"recording: {name} holds numbers that are not finite")

    @classmethod
    def of(cls, episodes: Iterable[Episode]) -> Recording:
        """ValueError if there is none."""
        found = [episode for episode in episodes if len(episode)]
        if not found:
            raise ValueError("recording: no whole episode")
        starts = np.concatenate([np.arange(len(e)) == 0 for e in found])
        return cls(
            np.concatenate([e.observations[: len(e)] for e in found]).astype(np.float32),
            np.concatenate([e.actions for e in found]).astype(np.float32),
            np.concatenate([e.rewards for e in found]).astype(np.float32),
            starts,
        )

    @classmethod
    def until(
        cls, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ends: np.ndarray
    ) -> Recording:
        """From flat arrays and the last step of each episode; what follows the last is left out."""
        last = np.flatnonzero(ends)
        count = int(last[-1]) + 1 if len(last) else 0
        starts = np.concatenate([[True], ends[:-1].astype(bool)])[:count]
        arrays = (a[:count].astype(np.float32) for a in (observations, actions, rewards))
        return cls(*arrays, starts)

    def __len__(self) -> int:
        return len(self.rewards)

    def check(self, task: ControlTask, source: str) -> Recording:
        """This recording; ValueError if its sizes are not the task's."""
        sizes = {"observations": task.observation_size, "actions": task.action_size}
        for name, size in sizes.items():
            shape = getattr(self, name).shape
            if len(shape) != 2 or shape[1] != size:
                raise ValueError(
                    f"{source}: {name} is {shape}, but {task.name} has {size} numbers per step"
                )
        return self

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First and one past the last step of every episode."""
        first = np.flatnonzero(self.starts).tolist()
        return list(zip(first, [*first[1:], len(self)]))

    @cached_property
    def togo(self) -> np.ndarray:
        """Return-to-go: the sum of rewards from each step to its episode's end, undiscounted."""
        wide = self.rewards.astype(np.float64)
        sums = [np.cumsum(wide[a:b][::-1])[::-1] for a, b in self.bounds]
        return np.concatenate(sums).astype(np.float32)

    @property
    def returns(self) -> np.ndarray:
        """One number per episode."""
        return self.togo[self.starts]

    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each observation; what never changes is divided by 1."""
        wide = self.observations.astype(np.float64)
        deviation = wide.std(0)
        return wide.mean(0), np.where(deviation < 1e-6, 1.0, deviation)

    def split(self, every: int = 20) -> tuple[Recording, Recording]:
        """To train and to measure on: every so many-th episode is held out, at least the last.

        Not the last of them all: in replay data those are the best. Raises ValueError for a single
        episode.
        """
        count = len(self.bounds)
        if count < 2:
            raise ValueError("recording: one episode is too few to train and measure on")
        chosen = np.arange(1, count + 1) % min(every, count) == 0
        held_out = chosen[np.cumsum(self.starts) - 1]
        return self._part(~held_out), self._part(held_out)

    def _part(self, rows: np.ndarray) -> Recording:
        return Recording(*(getattr(self, name)[rows] for name in self.__annotations__))

    def draw(self, seed: int, rows: int, context: int) -> Windows:
        """Windows of `context` steps that begin anywhere, across the ends of episodes too.

        Raises ValueError if the recording is shorter than a window.
        """
        generator = torch.Generator().manual_seed(seed)
        last = len(self) - context
        if last < 0:
            raise ValueError(f"context={context} exceeds the {len(self)} steps recorded")
        begins = torch.randint(last + 1, (rows,), generator=generator)
        return self.windows(begins.tolist(), context)

    def windows(self, begins: Sequence[int], context: int) -> Windows:
        at = np.asarray(begins)[:, None] + np.arange(context)
        arrays = (self.togo, self.observations, self.actions, self.starts)
        return Windows(*(torch.from_numpy(array[at]) for array in arrays))
