"""Act in a batch of environments, one episode after the other in every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from statewright.studies.rl.environments import frame_of
from statewright.studies.rl.model import Behaviour


@dataclass(eq=False)
class Played:
    """returns and lengths of the episodes, in the order of their seeds; what was carried per row.

    state_bytes: the largest at any step, of one row. frames: those of the first row, if asked.
    """

    returns: list[float]
    lengths: list[int]
    state_bytes: int = 0
    frames: list[np.ndarray] = field(default_factory=list)


def play(
    behaviour: Behaviour,
    make: Callable[[], Any],
    target: float,
    seeds: Sequence[int],
    rows: int = 10,
    frames: int = 0,
) -> Played:
    """One episode per seed, `rows` of them at a time; row r plays the seeds r, r + rows, ...

    Which row plays what is settled beforehand, and a row with nothing left to play leaves the
    batch, so no episode is preferred for being short. `make()` is any environment with
    gymnasium's reset and step. frames > 0: film the first row, and end after that many.
    """
    lanes = [list(range(r, len(seeds), rows)) for r in range(min(rows, len(seeds)))]
    environments = [make() for _ in lanes]
    played = Played([0.0] * len(seeds), [0] * len(seeds))
    try:
        _play(behaviour, environments, lanes, target, seeds, played, frames)
    finally:
        for environment in environments:
            environment.close()
    return played


def _play(
    behaviour: Behaviour,
    environments: list[Any],
    lanes: list[list[int]],
    target: float,
    seeds: Sequence[int],
    played: Played,
    frames: int,
) -> None:
    memory = behaviour.begin(len(lanes), target)
    live = list(range(len(lanes)))
    seen = {r: environments[r].reset(seed=seeds[lanes[r][0]])[0] for r in live}
    got, starts = dict.fromkeys(live, 0.0), dict.fromkeys(live, True)
    while live:
        action, memory = behaviour.act(
            memory,
            torch.from_numpy(np.stack([seen[r] for r in live])),
            torch.tensor([got[r] for r in live]),
            torch.tensor([starts[r] for r in live]),
        )
        played.state_bytes = max(played.state_bytes, memory.nbytes // len(live))
        if frames and live[0] == 0:
            played.frames.append(frame_of(environments[0]))
        left = []
        for i, r in enumerate(live):
            episode, environment = lanes[r][0], environments[r]
            seen[r], reward, *ended = environment.step(action[i].cpu().numpy())[:4]
            got[r], starts[r] = float(reward), any(ended)
            played.returns[episode] += got[r]
            played.lengths[episode] += 1
            if starts[r]:
                lanes[r].pop(0)
            if starts[r] and lanes[r]:
                seen[r] = environment.reset(seed=seeds[lanes[r][0]])[0]
            if lanes[r]:
                left.append(i)
        if len(left) < len(live):
            memory, live = memory.rows(left), [live[i] for i in left]
        if frames and len(played.frames) >= frames:
            return
