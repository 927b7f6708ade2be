"""Decision models: streaming is the whole sequence, episodes never meet, memory is constant."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from statewright.studies.experiment import System
from statewright.studies.rl.episodes import Episode, Recording, Windows
from statewright.studies.rl.model import DecisionModel, Memory
from statewright.studies.rl.play import play
from statewright.studies.rl.scores import PAPER, TASKS, name_of, task_of
from statewright.studies.rl.settings import DecisionSettings
from statewright.studies.rl.study import Bounded
from statewright.studies.rl.systems import CLONING, build, systems

HOPPER = TASKS["hopper"]
SETTINGS = DecisionSettings(hidden_size=32, context=4)
MIXERS = [name for name in systems(SETTINGS) if name != CLONING]
EXACT = 1e-12


def model_of(name: str, settings: DecisionSettings = SETTINGS) -> DecisionModel:
    model = build(System(name, 2), settings, HOPPER, 0).double().eval()
    assert isinstance(model, DecisionModel)
    return model


def windows_of(
    rows: int, steps: int, starts: list[tuple[int, int]]
) -> tuple[Windows, torch.Tensor]:
    """Random episodes that start at (row, step) and at step 0; the returns belong to `rewards`."""
    generator = torch.Generator().manual_seed(1)
    flags = torch.zeros(rows, steps, dtype=torch.bool)
    flags[:, 0] = True
    for row, step in starts:
        flags[row, step] = True
    drawn = torch.randn(rows, steps, 15, generator=generator, dtype=torch.float64)
    rewards, togo = 100 * drawn[..., 14], torch.zeros(rows, steps, dtype=torch.float64)
    for t in range(steps):
        togo[:, t] = torch.where(flags[:, t], 500.0, togo[:, t - 1] - rewards[:, t - 1])
    return Windows(togo, drawn[..., :11], drawn[..., 11:14].tanh(), flags), rewards


def streamed(model: DecisionModel, windows: Windows, rewards: torch.Tensor) -> torch.Tensor:
    """Actions (B, T, A) step by step; what was done is what the windows say, not what is asked."""
    memory, actions = model.begin(len(rewards), 500.0), []
    for t in range(rewards.shape[1]):
        got = rewards[:, t - 1] if t else torch.zeros(len(rewards))
        action, memory = model.act(memory, windows.observations[:, t], got, windows.starts[:, t])
        actions.append(action)
        memory = replace(memory, action=windows.actions[:, t])
    return torch.stack(actions, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", MIXERS)
def test_streaming_actions_are_those_of_the_whole_sequence(name) -> None:
    """Rows restart at different steps, twice in a row too; the Transformer's window is passed."""
    windows, rewards = windows_of(3, 18, [(0, 7), (1, 12), (2, 9), (2, 10)])
    model = model_of(name)
    with torch.no_grad():
        whole, state = model(windows)
        half, middle = model(Windows(*(t[:, :11] for t in vars(windows).values())))
        rest, end = model(Windows(*(t[:, 11:] for t in vars(windows).values())), middle)
    assert difference(streamed(model, windows, rewards), whole) < EXACT
    assert difference(torch.cat([half, rest], 1), whole) < EXACT
    assert torch.equal(state.seen, end.seen) and state.seen.tolist() == [33, 18, 24]


def leak(model: DecisionModel, right: DecisionModel, windows: Windows, rewards, first) -> float:
    """How far the actions of an episode in a stream are from those that it gets alone, `right`."""
    alone = Windows(*(t[:, first:] for t in vars(windows).values()))
    with torch.no_grad():
        whole = difference(model(windows)[0][:, first:], right(alone)[0])
    stream = streamed(model, windows, rewards)[:, first:]
    return max(whole, difference(stream, streamed(right, alone, rewards[:, first:])))


class Shifted(torch.nn.Module):
    """A trunk whose resets come one token late or early."""

    def __init__(self, trunk: torch.nn.Module, by: int) -> None:
        super().__init__()
        self.trunk, self.by, self.init_state = trunk, by, trunk.init_state

    def forward(self, reset=None, **inputs):
        reset = None if reset is None else reset.roll(self.by, 1)
        return self.trunk(reset=reset, **inputs)


@pytest.mark.parametrize("name", MIXERS)
def test_no_state_leaks_across_a_reset(name) -> None:
    """Controls: resets a token early (an old action stays), a token late, and a step late."""
    windows, rewards = windows_of(2, 12, [(0, 6), (1, 6)])
    model = model_of(name)
    assert leak(model, model, windows, rewards, 6) < EXACT
    for late in (-1, 1):
        wrong = model_of(name)
        wrong.trunk = Shifted(wrong.trunk, late)
        assert leak(wrong, model, windows, rewards, 6) > 1e-6, f"{late:+} token is not noticed"
    later = replace(windows, starts=windows.starts.roll(1, 1))
    assert leak(model, model, later, rewards, 6) > 1e-6


class Steps:
    """An environment of numpy: as many steps as the seed says, better the closer to a sine."""

    def __init__(self) -> None:
        self.closed = False

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        self.phase, self.left = float(seed), 3 + seed % 5
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple:
        reward = 10 - float(np.abs(action - np.sin(self.phase)).sum())
        self.phase, self.left = self.phase + 0.5 + 0.1 * float(action[0]), self.left - 1
        return self._look(), reward, self.left == 0, False, {}

    def close(self) -> None:
        self.closed = True

    def _look(self) -> np.ndarray:
        return np.sin(self.phase * np.arange(1, 12))


SEEDS = [4, 11, 3, 8, 10, 2, 6]


@pytest.mark.parametrize("name", ["mingru", "transformer"])
def test_episodes_do_not_depend_on_how_they_are_batched(name) -> None:
    """Rows restart within the batch and leave it; a model that ignores starts is found out."""
    model, made = model_of(name), []

    def make() -> Steps:
        made.append(Steps())
        return made[-1]

    alone = [play(model, make, 50.0, [seed]).returns[0] for seed in SEEDS]
    for rows in (1, 3, 10):
        played = play(model, make, 50.0, SEEDS, rows)
        assert played.returns == pytest.approx(alone, abs=1e-10)
        assert played.lengths == [3 + seed % 5 for seed in SEEDS]
    assert all(environment.closed for environment in made)

    class Deaf:
        begin = model.begin

        def act(self, memory: Memory, observation, reward, starts):
            return model.act(memory, observation, reward, torch.zeros_like(starts))

    assert play(Deaf(), make, 50.0, SEEDS, 3).returns != pytest.approx(alone, abs=1e-6)


def carried(model: DecisionModel, steps: int) -> tuple[list[int], list[float]]:
    """Bytes and processor seconds of every step of one row."""
    memory, sizes, seconds = model.begin(1, 100.0), [], []
    observation, start = torch.zeros(1, 11, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    for step in range(steps):
        before = time.process_time()
        _, memory = model.act(memory, observation, torch.ones(1), start & (step == 0))
        seconds.append(time.process_time() - before)
        sizes.append(memory.nbytes)
    return sizes, seconds


OTHERS = ("mamba", "s4", "minlstm", "aaren", "transformer")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize("name", ["mingru", *SLOW])
def test_a_step_costs_the_same_at_10_and_at_1000(name) -> None:
    """Bytes to the byte; time by the quickest of 50 steps, within what the clock allows."""
    sizes, seconds = carried(model_of(name, replace(SETTINGS, context=3)), 1000)
    assert len(set(sizes[9:])) == 1
    assert min(seconds[-50:]) < 2 * min(seconds[10:60])


def test_without_a_window_a_transformer_grows_unless_a_policy_bounds_it() -> None:
    """The control of the test above: a list without a bound, with a window, and under TOVA."""
    model = model_of("transformer", replace(SETTINGS, context=100))
    sizes, _ = carried(model, 20)
    assert sizes == sorted(set(sizes))
    sizes, _ = carried(model_of("transformer"), 20)
    assert len(set(sizes[9:])) == 1
    bounded = Bounded(model, "tova:budget=12")
    memory, sizes = bounded.begin(1, 100.0), []
    for step in range(20):
        start = torch.tensor([step == 0])
        _, memory = bounded.act(memory, torch.zeros(1, 11), torch.ones(1), start)
        sizes.append(memory.nbytes)
    assert len(set(sizes[9:])) == 1
    with pytest.raises(ValueError, match="this model has none"):
        Bounded(model_of("mingru"), "tova:budget=12")
    with pytest.raises(ValueError, match="no layer of this model is a linear recurrence"):
        Bounded(model, "forgetmore:decay=0.9")


def test_gradients_reach_every_parameter() -> None:
    model = model_of("mingru").train()
    windows, _ = windows_of(2, 6, [(0, 3)])
    model(windows)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_normalised_score_is_d4rls() -> None:
    for task in TASKS.values():
        assert task.score(task.random_return) == 0
        assert task.score(task.expert_return) == pytest.approx(100)
        assert task.return_of(task.score(1234.5)) == pytest.approx(1234.5)
    # 100 (3000 + 20.272305) / (3234.3 + 20.272305), by hand
    assert HOPPER.score(3000) == pytest.approx(92.80090, abs=1e-4)
    assert TASKS["halfcheetah"].score(0) == pytest.approx(2.256739, abs=1e-5)


def test_the_papers_table_has_the_papers_averages() -> None:
    averages = np.mean(list(PAPER.values()), 0)
    assert np.allclose(averages, [76.4, 68.6, 75.0, 78.8, 78.1, 78.2], atol=0.06)
    assert {task_of(name).name for name in PAPER} == set(TASKS)


def test_names_are_read_off_files_and_ids() -> None:
    assert name_of("data/hopper_medium_replay-v2.hdf5") == "hopper-medium-replay"
    assert name_of("/data/hopper/root/statewright/walker2d/medium-v0") == "walker2d-medium"
    assert name_of("mujoco/halfcheetah/expert-v0") == "halfcheetah-expert"
    assert name_of("halfcheetah_medium-v2.hdf5") == "halfcheetah-medium"
    for unclear in ("data.hdf5", "hopper.hdf5", "hopper_mediumish.hdf5"):
        with pytest.raises(ValueError, match="says no task and quality"):
            name_of(unclear)
    with pytest.raises(ValueError, match=r"expected a task.*tasks: halfcheetah, hopper"):
        task_of("ant-medium")


def episode(length: int, reward: float, terminated: bool = True) -> Episode:
    observations = np.arange(length + 1)[:, None] * np.ones(11) + reward
    rewards = reward * np.arange(1, length + 1)
    return Episode(observations, np.full((length, 3), 0.5), rewards, terminated)


def test_returns_to_go_end_with_their_episode() -> None:
    recording = Recording.of([episode(3, 1), episode(2, 10)])
    assert recording.togo.tolist() == [6, 5, 3, 30, 20]
    assert recording.returns.tolist() == [6, 30]
    assert recording.bounds == [(0, 3), (3, 5)]
    mean, deviation = recording.scale()
    assert mean[0] == pytest.approx((1 + 2 + 3 + 10 + 11) / 5)
    assert deviation[0] == pytest.approx(np.std([1, 2, 3, 10, 11]))


def test_windows_are_a_function_of_the_seed_and_know_where_episodes_start() -> None:
    recording = Recording.of([episode(4, r) for r in range(1, 8)])
    first, again, other = (recording.draw(seed, 6, 5) for seed in (0, 0, 1))
    assert torch.equal(first.togo, again.togo) and not torch.equal(first.togo, other.togo)
    assert first.observations.shape == (6, 5, 11) and first.actions.shape == (6, 5, 3)
    # An episode's first observation equals the factor of its rewards, and its return 10 of them.
    for window in (first, other):
        begun = window.observations[..., 0][window.starts]
        assert len(begun) and torch.equal(window.togo[window.starts], 10 * begun)
    with pytest.raises(ValueError, match="context=29 exceeds the 28 steps"):
        recording.draw(0, 1, 29)


def test_the_split_keeps_episodes_whole() -> None:
    recording = Recording.of([episode(4, r) for r in range(20)])
    train, held_out = recording.split(8)
    assert held_out.returns.tolist() == [70, 150] and held_out.bounds == [(0, 4), (4, 8)]
    assert train.returns.tolist() == [10 * r for r in range(20) if r not in (7, 15)]
    assert len(Recording.of([episode(4, r) for r in range(3)]).split()[1]) == 4
    with pytest.raises(ValueError, match="one episode is too few"):
        Recording.of([episode(9, 1)]).split()


def test_recordings_are_checked() -> None:
    recording = Recording.of([episode(3, 1)])
    assert recording.check(HOPPER, "here") is recording
    with pytest.raises(ValueError, match=r"here: observations is \(3, 11\), but walker2d has 17"):
        recording.check(TASKS["walker2d"], "here")
    with pytest.raises(ValueError, match="no whole episode"):
        Recording.of([])
    with pytest.raises(ValueError, match="rewards holds numbers that are not finite"):
        Recording.of([_nan()])
    with pytest.raises(ValueError, match="numbers of steps differ"):
        replace(recording, rewards=np.zeros(2, dtype=np.float32))


def _nan() -> Episode:
    good = episode(3, 1)
    return Episode(good.observations, good.actions, good.rewards * np.nan, True)


def test_wrong_sizes_are_named() -> None:
    model = model_of("mingru")
    windows, _ = windows_of(1, 2, [])
    with pytest.raises(ValueError, match=r"observations is \(1, 2, 10\)"):
        model(replace(windows, observations=windows.observations[..., :10]))
    with pytest.raises(ValueError, match=r"observation is \(1, 17\)"):
        start = torch.ones(1, dtype=torch.bool)
        model.act(model.begin(1, 0.0), torch.zeros(1, 17), torch.zeros(1), start)
