"""Datasets on disk and their collection; what needs the extra [rl] is skipped without it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from statewright.studies.rl import datasets
from statewright.studies.rl.episodes import Episode, Recording
from statewright.studies.rl.scores import TASKS
from statewright.studies.rl.settings import CollectSettings

HOPPER = TASKS["hopper"]


def stored(path, steps: int = 10, ends=(3, 7), **changed):
    """A D4RL file: episodes end after the given steps, the first by the task, others by time."""
    h5py = pytest.importorskip("h5py")
    generator = np.random.default_rng(0)
    terminals, timeouts = np.zeros(steps, dtype=bool), np.zeros(steps, dtype=bool)
    terminals[ends[0]], timeouts[list(ends[1:])] = True, True
    arrays = {
        "observations": generator.normal(size=(steps, 11)).astype(np.float32),
        "actions": generator.normal(size=(steps, 3)).astype(np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        **changed,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return arrays


def test_a_d4rl_file_becomes_whole_episodes(tmp_path) -> None:
    arrays = stored(tmp_path / "hopper_medium-v2.hdf5")
    found = datasets.read(tmp_path / "hopper_medium-v2.hdf5", HOPPER)
    assert found.bounds == [(0, 4), (4, 8)], "steps after the last end are left out"
    assert np.array_equal(found.observations, arrays["observations"][:8])
    assert found.togo.tolist() == [6, 6, 5, 3, 22, 18, 13, 7]


def test_a_wrong_d4rl_file_says_what_is_wrong(tmp_path) -> None:
    path = tmp_path / "d.hdf5"
    for name in datasets.FIELDS:
        stored(path, **{name: None})
        with pytest.raises(ValueError, match=f"has no field '{name}'"):
            datasets.read(path, HOPPER)
    stored(path, rewards=np.zeros(4))
    with pytest.raises(ValueError, match="fields differ in their number of steps"):
        datasets.read(path, HOPPER)
    nothing = np.zeros(10, dtype=bool)
    stored(path, terminals=nothing, timeouts=nothing)
    with pytest.raises(ValueError, match="no step is marked"):
        datasets.read(path, HOPPER)
    stored(path)
    with pytest.raises(ValueError, match="but walker2d has 17 numbers per step"):
        datasets.read(path, TASKS["walker2d"])
    path.write_text("no data")
    with pytest.raises(ValueError, match="no HDF5 file"):
        datasets.read(path, HOPPER)


def episodes() -> list[Episode]:
    generator = np.random.default_rng(1)
    return [
        Episode(
            generator.normal(size=(length + 1, 11)),
            generator.uniform(-1, 1, (length, 3)).astype(np.float32),
            generator.normal(size=length),
            terminated,
        )
        for length, terminated in ((5, True), (1, False), (8, True))
    ]


def test_episodes_come_back_from_minari_as_they_were(tmp_path, monkeypatch) -> None:
    minari = pytest.importorskip("minari")
    pytest.importorskip("mujoco")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "before")
    name = "statewright/hopper/medium-v0"
    place = datasets.write_minari(name, episodes(), HOPPER, tmp_path, "by hand")
    assert os.environ["MINARI_DATASETS_PATH"] == "before"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    kept = Recording.of(episodes())
    for source in (place, str(place), place / "data", name):
        found = datasets.read(source, HOPPER)
        for field in ("observations", "actions", "rewards", "starts"):
            assert np.array_equal(getattr(found, field), getattr(kept, field)), (source, field)
    dataset = minari.load_dataset(name)
    assert [bool(e.terminations[-1]) for e in dataset] == [True, False, True]
    assert [bool(e.truncations[-1]) for e in dataset] == [False, True, False]
    assert not any(e.terminations[:-1].any() or e.truncations[:-1].any() for e in dataset)
    assert dataset.storage.metadata["ref_max_score"] == HOPPER.expert_return
    with pytest.raises(ValueError, match="but walker2d has 17"):
        datasets.read(place, TASKS["walker2d"])
    with pytest.raises(ValueError, match="is there already"):
        datasets.write_minari(name, episodes(), HOPPER, tmp_path, "by hand")
    for nothing in (tmp_path, "statewright/hopper/none-v0", "what is this"):
        with pytest.raises(ValueError, match="neither a file nor a Minari dataset"):
            datasets.read(nothing, HOPPER)


def environment():
    """A gymnasium environment of numpy that ends after seven steps, by itself or by time."""
    gymnasium = pytest.importorskip("gymnasium")

    class Steps(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float64)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 7
            return self.np_random.normal(size=11), {}

        def step(self, action):
            self.left -= 1
            done = self.left == 0
            seen, odd = self.np_random.normal(size=11), self.np_random.random() < 0.5
            return seen, float(action.sum()), done and odd, done and not odd, {}

    return Steps()


def collect(root, events: list, **changed):
    pytest.importorskip("stable_baselines3")
    from statewright.studies.rl.collect import Collection

    chosen = {"steps": 60, "medium_score": -50.0, "expert_score": 50.0, "max_steps": 2048}
    settings = CollectSettings(**{**chosen, "save_every": 2048, **changed})
    return Collection(settings, root, events.append, environment).run()


def test_collecting_makes_three_sets_and_does_nothing_twice(tmp_path) -> None:
    events: list[dict] = []
    medium = datasets.read(collect(tmp_path, events), HOPPER)
    assert len(medium) >= 60 and len(medium) % 7 == 0, "only whole episodes"
    assert [e["stage"] for e in events] == ["medium", "medium data", "stored"]
    replay = datasets.read(collect(tmp_path, events, quality="medium-replay"), HOPPER)
    assert events[3]["stage"] == "stored", "the agent does not learn again"
    assert len(replay) >= 140
    events.clear()
    both = datasets.read(collect(tmp_path, events, quality="medium-expert"), HOPPER)
    assert [e["stage"] for e in events] == ["expert", "expert data", "stored"]
    assert events[0]["steps"] >= 2048 and len(both) >= 120
    assert np.array_equal(both.observations[: len(medium)], medium.observations)
    events.clear()
    collect(tmp_path, events)
    assert events == []
    with pytest.raises(ValueError, match=r"began with seed=0 \(now 1\)"):
        collect(tmp_path, events, seed=1)


def test_collecting_is_seeded_and_goes_on_after_a_stop(tmp_path) -> None:
    first = datasets.read(collect(tmp_path / "a", []), HOPPER)
    again = datasets.read(collect(tmp_path / "b", []), HOPPER)
    other = datasets.read(collect(tmp_path / "c", [], seed=1), HOPPER)
    assert np.array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions[:60], other.actions[:60])

    class Stop(list):
        def append(self, event: dict) -> None:
            super().append(event)
            if len(self) == 2:
                raise KeyboardInterrupt

    events = Stop()
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "d", events, medium_score=49.0, max_steps=4096)
    events = []
    with pytest.raises(ValueError, match="below medium_score=49"):
        collect(tmp_path / "d", events, medium_score=49.0, max_steps=4096)
    assert next(e["steps"] for e in events) > 2048, "not from the beginning"


def test_the_tasks_are_what_the_table_says() -> None:
    pytest.importorskip("mujoco")
    from statewright.studies.rl.environments import make_environment

    for task in TASKS.values():
        made = make_environment(task)
        observation, _ = made.reset(seed=0)
        assert observation.shape == (task.observation_size,)
        assert made.action_space.low.tolist() == [-1.0] * task.action_size
        made.close()
