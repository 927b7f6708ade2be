"""Online agents of Stable-Baselines3, recorded while they learn; imported by `collect` alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from statewright.studies.experiment import Listener
from statewright.studies.rl.episodes import Episode

Make = Callable[[], Any]
_KINDS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "sac": SAC, "td3": TD3}
_OFF_POLICY: dict[str, Any] = {
    "batch_size": 128,
    "train_freq": 2,
    "gradient_steps": 1,
    "learning_starts": 5000,
    "buffer_size": 300_000,
}
# Small networks and few updates: a medium policy early on one core, not the best one late.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 256, "batch_size": 128, "n_epochs": 10, "gae_lambda": 0.95},
    "sac": _OFF_POLICY,
    "td3": _OFF_POLICY,
}
_NETS = {"ppo": [64, 64], "sac": [128, 128], "td3": [128, 128]}
_RECENT = 20


class Recorder(gymnasium.Wrapper):
    """Keeps every finished episode of an environment."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.episodes: list[Episode] = []
        self._seen: list[np.ndarray] = []
        self._did: list[np.ndarray] = []
        self._got: list[float] = []

    def reset(self, **options: Any) -> Any:
        observation, info = self.env.reset(**options)
        self._seen, self._did, self._got = [np.copy(observation)], [], []
        return observation, info

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._seen.append(np.copy(observation))
        self._did.append(np.copy(action))
        self._got.append(float(reward))
        if terminated or truncated:
            arrays = (np.asarray(self._seen), np.asarray(self._did), np.asarray(self._got))
            self.episodes.append(Episode(*arrays, bool(terminated)))
        return observation, reward, terminated, truncated, info


@dataclass(eq=False)
class Agent:
    """An agent, its environments, and all episodes that it has lived through so far.

    PPO learns from normalised observations and rewards in 8 environments, SAC and TD3 from raw
    ones in one. What is recorded is raw.
    """

    kind: str
    model: BaseAlgorithm
    environments: VecEnv
    episodes: list[Episode]

    @classmethod
    def new(cls, kind: str, make: Make, seed: int) -> Agent:
        environments = _vectorised(kind, make)
        model = _KINDS[kind](
            "MlpPolicy",
            environments,
            seed=seed,
            device="cpu",
            policy_kwargs={"net_arch": _NETS[kind]},
            **_OPTIONS[kind],
        )
        return cls(kind, model, environments, [])

    @property
    def steps(self) -> int:
        return self.model.num_timesteps

    def learn(self, until: int, score_of: Callable[[float], float], wanted: float) -> float:
        """Learn up to `until` steps, or until the last 20 episodes score `wanted`; their score."""
        watch = _Watch(self, score_of, wanted)
        self.model.learn(until - self.steps, callback=watch, reset_num_timesteps=False)
        return watch.score()

    def gather(self) -> list[Episode]:
        """All episodes, those that the environments still hold included."""
        for recorder in self.recorders:
            self.episodes += recorder.episodes
            recorder.episodes = []
        return self.episodes

    @property
    def recorders(self) -> list[Any]:
        inner = getattr(self.environments, "venv", self.environments)
        found = []
        for environment in inner.envs:
            while not isinstance(environment, Recorder):
                environment = environment.env
            found.append(environment)
        return found

    def act(self, observations: np.ndarray) -> np.ndarray:
        """Drawn actions, as the agent acts while it learns; from torch's generator."""
        if isinstance(self.environments, VecNormalize):
            observations = self.environments.normalize_obs(observations)
        return self.model.predict(observations, deterministic=False)[0]

    def save(self, directory: Path) -> None:
        """Everything that learning goes on from; the directory is whole or absent."""
        scratch = directory.with_name(f".{directory.name}.writing")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.model.save(scratch / "model.zip")
        if isinstance(self.environments, VecNormalize):
            self.environments.save(str(scratch / "normalise.pkl"))
        if self.kind != "ppo":
            self.model.save_replay_buffer(scratch / "buffer.pkl")
        save_episodes(scratch / "episodes.npz", self.gather())
        shutil.rmtree(directory, ignore_errors=True)
        scratch.replace(directory)

    @classmethod
    def load(cls, kind: str, make: Make, directory: Path) -> Agent:
        """Go on from `save`; the environments begin new episodes."""
        environments = _vectorised(kind, make)
        if kind == "ppo":
            saved = str(directory / "normalise.pkl")
            environments = VecNormalize.load(saved, environments.venv)
        model = _KINDS[kind].load(directory / "model.zip", env=environments, device="cpu")
        if kind != "ppo":
            model.load_replay_buffer(directory / "buffer.pkl")
        return cls(kind, model, environments, load_episodes(directory / "episodes.npz"))


class _Watch(BaseCallback):
    """Ends learning when the last episodes are good enough, looked at every 1,000 steps or so."""

    def __init__(self, agent: Agent, score_of: Callable[[float], float], wanted: float) -> None:
        super().__init__()
        self.agent, self.score_of, self.wanted = agent, score_of, wanted
        self._next = 0

    def score(self) -> float:
        """Of the mean return of the last 20 episodes; that of nothing is below everything."""
        last = self.agent.gather()[-_RECENT:]
        if len(last) < _RECENT:
            return float("-inf")
        return self.score_of(float(np.mean([e.rewards.sum() for e in last])))

    def _on_step(self) -> bool:
        if self.num_timesteps < self._next:
            return True
        self._next = self.num_timesteps + 1000
        return self.score() < self.wanted


def _vectorised(kind: str, make: Make) -> Any:
    if kind != "ppo":
        return DummyVecEnv([lambda: Recorder(make())])
    return VecNormalize(DummyVecEnv([lambda: Recorder(make()) for _ in range(8)]))


def roll_out(agent: Agent, make: Make, steps: int, seed: int, rows: int = 8) -> list[Episode]:
    """Whole episodes of the agent acting, `steps` of them or a few more.

    Once there are enough no episode begins, but those begun end: stopping all at once would
    prefer short ones.
    """
    model_seed = seed % 2**31
    agent.model.set_random_seed(model_seed)
    environments = [Recorder(make()) for _ in range(rows)]
    observations = [e.reset(seed=model_seed + i)[0] for i, e in enumerate(environments)]
    live, total = list(range(rows)), 0
    while live:
        actions = agent.act(np.asarray([observations[i] for i in live]))
        for i, action in zip(list(live), actions):
            observations[i], _, terminated, truncated, _ = environments[i].step(action)
            total += 1
            if not (terminated or truncated):
                continue
            if total < steps:
                observations[i] = environments[i].reset()[0]
            else:
                live.remove(i)
    for environment in environments:
        environment.close()
    return [episode for e in environments for episode in e.episodes]


def save_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """One .npz, replaced as a whole."""
    scratch = path.with_name(f".{path.name}.writing.npz")
    arrays = {}
    for i, e in enumerate(episodes):
        arrays |= {f"o{i}": e.observations, f"a{i}": e.actions, f"r{i}": e.rewards}
    ends = np.array([e.terminated for e in episodes], dtype=bool)
    np.savez(scratch, terminated=ends, **arrays)
    scratch.replace(path)


def load_episodes(path: Path) -> list[Episode]:
    with np.load(path) as file:
        return [
            Episode(file[f"o{i}"], file[f"a{i}"], file[f"r{i}"], bool(ended))
            for i, ended in enumerate(file["terminated"])
        ]


def report(listen: Listener, agent: Agent, stage: str, score: float) -> None:
    listen({"stage": stage, "steps": agent.steps, "score": score})
