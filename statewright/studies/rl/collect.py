"""Medium, medium-replay and medium-expert data of our own, in stages that are done only once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statewright.cells import write_json
from statewright.studies.experiment import Listener
from statewright.studies.rl.datasets import write_minari
from statewright.studies.rl.environments import make_environment
from statewright.studies.rl.episodes import Episode, Recording
from statewright.studies.rl.optional import need
from statewright.studies.rl.scores import task_of
from statewright.studies.rl.settings import CollectSettings

if TYPE_CHECKING:
    from statewright.studies.rl.agents import Agent

# What decides about the agent; the rest may differ between two calls on the same work.
_AGENT = ("task", "algorithm", "seed", "medium_score", "expert_score", "max_steps")
_PART = 20_000


def dataset_id(task: str, quality: str) -> str:
    """Minari's id of what `collect` stores."""
    return f"statewright/{task}/{quality}-v0"


@dataclass(eq=False)
class Collection:
    """One task's collection below `root`: `run()` does what is missing and returns the dataset.

    The agent learns until its last 20 episodes score `medium_score` (medium: what it then does;
    medium-replay: all that it did until then), and on to `expert_score` for medium-expert (half
    the medium part, half of the better agent). Learning that was interrupted goes on from its
    last checkpoint, in new episodes. Differs from D4RL, whose agent is SAC.
    """

    settings: CollectSettings
    root: Path
    listen: Listener
    make: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        for package in ("gymnasium", "minari", "stable_baselines3", "h5py"):
            need(package)
        self.task = task_of(self.settings.task)
        self.work = self.root / ".collect" / f"{self.task.name}-{self.settings.algorithm}"
        if self.make is None:
            make_environment(self.task).close()
            self.make = lambda: make_environment(self.task)
        self._check_agent()

    def _check_agent(self) -> None:
        path = self.work / "settings.json"
        now = {name: asdict(self.settings)[name] for name in _AGENT}
        if not path.is_file():
            write_json(path, now)
            return
        before = json.loads(path.read_text())
        other = [f"{n}={before.get(n)} (now {now[n]})" for n in _AGENT if before.get(n) != now[n]]
        if other:
            raise ValueError(f"{self.work}: began with {', '.join(other)}; choose another root")

    def run(self) -> Path:
        """The dataset's directory. Raises ValueError if the agent ends below a medium one."""
        quality, place = self.settings.quality, None
        place = self.root / dataset_id(self.task.name, quality)
        if place.exists():
            return place
        medium = self._agent("medium", self.settings.medium_score)
        if quality == "medium-replay":
            episodes = medium.gather()
        else:
            episodes = self._behaviour("medium", medium)
        if quality == "medium-expert":
            expert = self._agent("expert", self.settings.expert_score)
            episodes = episodes + self._behaviour("expert", expert)
        about = f"{self.settings.algorithm} of stable_baselines3, {medium.steps:,} steps to medium"
        place = write_minari(
            dataset_id(self.task.name, quality), episodes, self.task, self.root, about
        )
        recording = Recording.of(episodes)
        mean = float(recording.returns.mean())
        self.listen(
            {
                "stage": "stored",
                "steps": len(recording),
                "episodes": len(recording.bounds),
                "mean return": mean,
                "best return": float(recording.returns.max()),
                "score": self.task.score(mean),
            }
        )
        return place

    def _agent(self, stage: str, wanted: float) -> Agent:
        """The agent at the end of a stage of learning, which is done if it was not."""
        from statewright.studies.rl.agents import Agent, report

        kind, done = self.settings.algorithm, self.work / stage
        if done.is_dir():
            return Agent.load(kind, self.make, done)
        agent, limit = self._begun(), self.settings.max_steps
        score = float("-inf")
        while score < wanted and agent.steps < limit:
            until = min(limit, agent.steps + self.settings.save_every)
            score = agent.learn(until, self.task.score, wanted)
            report(self.listen, agent, stage, score)
            if score < wanted:
                agent.save(self.work / "learning")
        if stage == "medium" and score < wanted:
            raise ValueError(
                f"{self.task.name}: score {score:.1f} after max_steps={limit} is below "
                f"medium_score={wanted}; choose a lower one, more steps or another algorithm"
            )
        agent.save(done)
        return agent

    def _begun(self) -> Agent:
        """Where learning stands: its last checkpoint, the medium agent, or nothing."""
        from statewright.studies.rl.agents import Agent

        kind = self.settings.algorithm
        found = [self.work / name for name in ("learning", "medium")]
        agents = [Agent.load(kind, self.make, p) for p in found if p.is_dir()]
        if not agents:
            return Agent.new(kind, self.make, self.settings.seed)
        return max(agents, key=lambda agent: agent.steps)

    def _behaviour(self, stage: str, agent: Agent) -> list[Episode]:
        """At least `steps` steps of an agent, in parts that are kept."""
        from statewright.studies.rl.agents import load_episodes, roll_out, save_episodes

        episodes: list[Episode] = []
        part, share = 0, min(_PART, self.settings.steps)
        while sum(map(len, episodes)) < self.settings.steps:
            path = self.work / f"{stage}-part{part}.npz"
            if not path.is_file():
                seed = self.settings.seed * 1_000_003 + 1000 * (part + 1) + len(stage)
                save_episodes(path, roll_out(agent, self.make, share, seed))
                self.listen({"stage": f"{stage} data", "part": part})
            episodes += load_episodes(path)
            part += 1
        return episodes
