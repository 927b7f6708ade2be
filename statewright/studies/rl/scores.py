"""Tasks, D4RL's normalised score, and the minimal-RNN paper's table; nothing is imported here."""

from __future__ import annotations

import re
from dataclasses import dataclass

QUALITIES = ("medium", "medium-replay", "medium-expert")
SYSTEMS_OF_PAPER = ("transformer", "s4", "aaren", "mamba", "minlstm", "mingru")
# Expert-normalised scores, table 3 of arXiv:2410.01201: Decision Transformer, S4, Aaren, Mamba
# (quoted there from their own papers), minLSTM and minGRU, in the order of SYSTEMS_OF_PAPER.
PAPER = {
    "halfcheetah-medium": (42.6, 42.5, 42.2, 42.8, 42.7, 43.0),
    "hopper-medium": (68.4, 54.2, 80.9, 83.5, 85.0, 79.4),
    "walker2d-medium": (75.5, 78.0, 74.4, 78.2, 72.0, 73.3),
    "halfcheetah-medium-replay": (37.0, 15.2, 37.9, 39.6, 38.6, 38.5),
    "hopper-medium-replay": (85.6, 49.6, 77.9, 82.6, 88.5, 90.5),
    "walker2d-medium-replay": (71.2, 69.0, 71.4, 70.9, 69.7, 72.8),
    "halfcheetah-medium-expert": (88.8, 92.7, 75.7, 91.9, 85.4, 86.3),
    "hopper-medium-expert": (109.6, 110.8, 103.9, 111.1, 110.3, 109.7),
    "walker2d-medium-expert": (109.3, 105.7, 110.5, 108.3, 110.3, 110.3),
}


@dataclass(frozen=True)
class ControlTask:
    """A MuJoCo task: its environment, its sizes, and D4RL's returns of a random and an expert one.

    The two returns were measured by D4RL in environments of version 2 (`d4rl/infos.py`); they are
    the same for every quality of data.
    """

    name: str
    environment: str
    observation_size: int
    action_size: int
    random_return: float
    expert_return: float

    def score(self, episode_return: float) -> float:
        """100 (R - random) / (expert - random): 0 is a random policy, 100 D4RL's expert."""
        span = self.expert_return - self.random_return
        return 100 * (episode_return - self.random_return) / span

    def return_of(self, score: float) -> float:
        """The return with that normalised score."""
        return self.random_return + score / 100 * (self.expert_return - self.random_return)


TASKS = {
    task.name: task
    for task in (
        ControlTask("halfcheetah", "HalfCheetah-v5", 17, 6, -280.178953, 12135.0),
        ControlTask("hopper", "Hopper-v5", 11, 3, -20.272305, 3234.3),
        ControlTask("walker2d", "Walker2d-v5", 17, 6, 1.629008, 4592.3),
    )
}


def task_of(name: str) -> ControlTask:
    """The task of `hopper` or of a dataset called `hopper-medium`; ValueError for another."""
    task = TASKS.get(name.partition("-")[0])
    if task is None:
        raise ValueError(
            f"name={name!r}, expected a task, such as hopper, or a task and a quality, such as "
            f"hopper-medium (tasks: {', '.join(TASKS)})"
        )
    return task


def name_of(source: str) -> str:
    """The dataset's name in a path or id: `d4rl/hopper_medium-v2.hdf5` -> `hopper-medium`.

    Raises ValueError if a task and a quality cannot be read from it.
    """
    text = re.sub(r"[_/\\]+", "-", source.lower())
    longest = sorted((*QUALITIES, "expert", "random", "simple"), key=len, reverse=True)
    found = re.findall(rf"({'|'.join(TASKS)})-({'|'.join(longest)})(?![a-z])", text)
    if not found:
        raise ValueError(
            f"{source}: says no task and quality; give a name, such as name='hopper-medium'"
        )
    return "-".join(found[-1])
