"""The study around the decision models: cells that resume, models on disk, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from statewright.cells import run_cells
from statewright.cli import main
from statewright.studies.experiment import Place, System, read_study
from statewright.studies.rl import study
from statewright.studies.rl.environments import check_film, frame_of, make_environment, write_film
from statewright.studies.rl.episodes import Episode, Recording
from statewright.studies.rl.model import RandomActions
from statewright.studies.rl.optional import need
from statewright.studies.rl.play import play
from statewright.studies.rl.scores import TASKS
from statewright.studies.rl.settings import CollectSettings, DecisionSettings, EvaluateSettings
from statewright.studies.rl.systems import Trained, build, load_model, save_model

HOPPER, CPU = TASKS["hopper"], torch.device("cpu")
TINY = DecisionSettings(
    hidden_size=8, num_steps=6, batch_size=4, eval_every=2, num_eval=8, context=4, warmup=3
)


class Steps:
    """Nine steps; the reward says how close the action is to a function of the observation."""

    def __init__(self, task=None) -> None:
        pass

    def reset(self, seed: int):
        self.generator, self.left = np.random.default_rng(seed), 9
        return self._look(), {}

    def step(self, action: np.ndarray):
        reward = 1 - float(np.abs(action - wanted(self.seen)).mean())
        self.left -= 1
        return self._look(), reward, False, self.left == 0, {}

    def close(self) -> None:
        pass

    def render(self) -> np.ndarray:
        return np.full((16, 16, 3), self.left, dtype=np.uint8)

    def _look(self) -> np.ndarray:
        self.seen = self.generator.normal(size=11)
        return self.seen


def wanted(observation: np.ndarray) -> np.ndarray:
    return np.tanh(observation[..., :3])


def recording(episodes: int = 12, noise: float = 0.0) -> Recording:
    """What a perfect (or a noisy) actor does in `Steps`."""
    found = []
    for seed in range(episodes):
        generator = np.random.default_rng(seed)
        seen = generator.normal(size=(10, 11))
        actions = wanted(seen[:9]) + noise * generator.normal(size=(9, 3))
        rewards = 1 - np.abs(actions - wanted(seen[:9])).mean(1)
        found.append(Episode(seen, actions, rewards, False))
    return Recording.of(found)


def cells_in(tmp_path, systems=("mingru/1",), listen=lambda event: None, settings=TINY, seeds=(0,)):
    place = Place(tmp_path / "work", CPU, listen)
    arguments = (settings, recording(), "hopper-medium", systems, seeds, place, tmp_path / "models")
    return study.train_cells(*arguments)


def test_training_is_reproduced_and_goes_on_where_it_was(tmp_path) -> None:
    settings = DecisionSettings(**{**vars(TINY), "save_every": 3})
    torch.manual_seed(1)
    (cell,) = cells_in(tmp_path / "a", settings=settings)
    assert cell.key == "train/hopper-medium/mingru/1/seed0"
    whole, steps = cell.run(), []

    def stop(point: dict) -> None:
        steps.append(point["step"])
        if len(steps) == 2:
            raise KeyboardInterrupt

    torch.manual_seed(2)
    (cell,) = cells_in(tmp_path / "b", listen=stop, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        cell.run()
    assert cell.run() == whole and steps == [2, 4, 4, 6]
    (other,) = cells_in(tmp_path / "c", settings=settings, seeds=[1])
    assert other.run()["curve"] != whole["curve"]
    weights = [
        (tmp_path / name / "models/hopper-medium/mingru/1/seed0.safetensors").read_bytes()
        for name in "ab"
    ]
    assert weights[0] == weights[1]


def test_the_learning_rate_warms_up(tmp_path) -> None:
    """A warm-up that never ends leaves the weights nearly where they were."""
    losses = {}
    for warmup in (0, 10**9):
        settings = DecisionSettings(**{**vars(TINY), "warmup": warmup, "learning_rate": 0.01})
        (cell,) = cells_in(tmp_path / str(warmup), settings=settings)
        losses[warmup] = [point["loss"] for point in cell.run()["curve"]]
    assert losses[10**9][0] == pytest.approx(losses[10**9][-1], abs=1e-6)
    assert abs(losses[0][0] - losses[0][-1]) > 1e-3


@pytest.mark.parametrize(
    "name", ["mingru/1", "bc/1", pytest.param("transformer/1", marks=pytest.mark.slow)]
)
def test_training_learns_what_the_data_show(tmp_path, name) -> None:
    changed = {"num_steps": 150, "eval_every": 150, "hidden_size": 32, "learning_rate": 0.01}
    settings = DecisionSettings(**{**vars(TINY), **changed, "dropout": 0.0, "clip": 1.0})
    (cell,) = cells_in(tmp_path, [name], settings=settings)
    assert cell.run()["loss"] < 0.25 * np.var(recording().actions)
    trained = load_model(study.model_path(tmp_path / "models", cell.key))
    learned = play(trained.model, Steps, trained.best_return, range(100, 104)).returns
    random = play(RandomActions(11, 3, 0), Steps, 0.0, range(100, 104)).returns
    assert min(learned) > max(random)


def test_a_stored_model_acts_as_the_one_it_was(tmp_path) -> None:
    system = System("minlstm", 2)
    model = build(system, TINY, HOPPER, 0).eval()
    model.fit_scale(recording())
    seen = model.normalised(torch.from_numpy(recording().observations))
    assert seen.mean(0).abs().max() < 1e-5 and (seen.std(0, False) - 1).abs().max() < 1e-4
    path = tmp_path / "model.safetensors"
    save_model(path, Trained(model, "hopper-medium", 12.5), system, TINY)
    loaded = load_model(path)
    assert (loaded.dataset, loaded.best_return, loaded.task) == ("hopper-medium", 12.5, HOPPER)
    assert loaded.model.mean.abs().sum() > 0 and torch.equal(loaded.model.mean, model.mean)
    seeds = range(5)
    assert play(loaded.model, Steps, 9.0, seeds).returns == play(model, Steps, 9.0, seeds).returns
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no decision model of this study"):
        load_model(path)
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "other.safetensors")


def trained_study(tmp_path) -> tuple[Path, dict]:
    output = tmp_path / "r.json"
    list(run_cells(cells_in(tmp_path, ["mingru/1", "bc/1"]), output, {"study": study.NAME}))
    return output, read_study(output, study.NAME)


def test_scores_are_cells_too_and_the_table_has_the_papers(tmp_path) -> None:
    output, found = trained_study(tmp_path)
    place, models = Place(tmp_path / "work", CPU, lambda event: None), tmp_path / "models"
    settings = EvaluateSettings(episodes=3, rows=2)
    score = partial(study.score_cells, found, models, settings, place, make=Steps)
    keys = [key for key, _ in run_cells(score(), output, {})]
    names = ("mingru/1:episodes=3", "bc/1:episodes=3", "random:episodes=3")
    assert keys == [f"score/hopper-medium/{name}/seed0" for name in names]
    assert list(run_cells(score(), output, {})) == []
    found = read_study(output)
    result = found["cells"][keys[0]]
    assert result["return"] == pytest.approx(np.mean(result["returns"]))
    assert result["score"] == pytest.approx(HOPPER.score(result["return"]))
    assert result["lengths"] == [9] * 3 and result["target_return"] == pytest.approx(9.0)
    rows = {row["system"]: row for row in study.table([found])}
    assert rows["mingru/1:episodes=3"]["paper"] == 79.4
    assert rows["random:episodes=3"]["paper"] == ""
    assert rows["bc/1:episodes=3"]["data"] == f"{HOPPER.score(9.0):.1f}"
    only = study.score_cells(found, models, settings, place, ["mingru/1"], Steps)
    assert [cell.key for cell in only] == keys[:1]
    with pytest.raises(ValueError, match="no such trained model"):
        study.score_cells(found, models, settings, place, ["mamba/3"], Steps)
    bounded = EvaluateSettings(policy="tova:budget=8")
    cells = study.score_cells(found, models, bounded, place, make=Steps)
    assert len(cells) == 2 and "policy=tova:budget=8" in cells[0].key
    for cell, reason in zip(cells, ("this model has none", "no state to bound")):
        with pytest.raises(ValueError, match=reason):
            cell.run()


def test_a_film_shows_the_steps(tmp_path) -> None:
    trained_study(tmp_path)
    path = tmp_path / "models/hopper-medium/mingru/1/seed0.safetensors"
    played = study.film(path, 0.0, 0, 4, Steps)
    assert [frame[0, 0, 0] for frame in played.frames] == [9, 8, 7, 6]
    with pytest.raises(ValueError, match=r"expected a file called \.gif or \.mp4"):
        check_film("film.avi")
    pytest.importorskip("imageio")
    import imageio.v3

    write_film(played.frames, tmp_path / "film.gif")
    assert imageio.v3.imread(tmp_path / "film.gif").shape[0] == 4
    assert [p.name for p in tmp_path.glob("*film*")] == ["film.gif"]


def test_without_a_backend_the_error_says_what_to_set() -> None:
    class Blind:
        def render(self):
            raise RuntimeError("gladLoadGL error")

    for environment in (Blind(), type("None_", (), {"render": lambda self: None})()):
        with pytest.raises(ValueError, match=r"no rendering backend .*MUJOCO_GL=egl"):
            frame_of(environment)


def test_what_is_not_installed_names_the_extra(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"pip install 'statewright\[rl\]'"):
        need("no_such_package_at_all")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match=r"gymnasium cannot be imported .*extra \[rl\]"):
        make_environment(HOPPER)


def test_settings_are_checked_and_the_papers_differ_by_dataset() -> None:
    paper = DecisionSettings.paper_for
    assert (paper("hopper-medium").hidden_size, paper("hopper-medium").learning_rate) == (256, 1e-4)
    walker = paper("walker2d-medium")
    assert (walker.hidden_size, walker.learning_rate) == (128, 1e-4)
    expert = paper("hopper-medium-expert")
    assert (expert.hidden_size, expert.learning_rate, expert.num_steps) == (128, 1e-3, 100_000)
    assert (expert.warmup, expert.batch_size, expert.weight_decay) == (10_000, 64, 1e-4)
    for wrong in ({"context": 0}, {"warmup": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            DecisionSettings(**wrong)
    for wrong in ({"quality": "best"}, {"algorithm": "dqn"}, {"steps": 0}, {"medium_score": 95.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            CollectSettings(**wrong)
    with pytest.raises(ValueError, match="expected a task"):
        CollectSettings(task="ant")
    with pytest.raises(ValueError, match="episodes=0"):
        EvaluateSettings(episodes=0)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, statewright.cli as c; c.main(['study', 'rl', 'train', '--help']);"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--context" in done.stdout
    assert not set(done.stderr.split()) & {"torch", "numpy", "gymnasium", "rich"}


MISTAKES = {
    "read off": (["train", "--data", "x.hdf5", "--output", "r.json"], "says no task and quality"),
    "name": (["train", "--data", "x", "--name", "ant-medium", "--output", "r.json"], "--name="),
    "file": (["train", "--data", "hopper_medium.hdf5", "--output", "r.json"], "no such file"),
    "option": (["train", "--data", "x", "--output", "r.json", "--context", "0"], "no task and"),
    "results": (["evaluate", "r.json"], "r.json: no such file"),
    "table": (["table", "r.json"], "r.json: no such file"),
    "model": (["render", "m.safetensors", "f.gif"], ""),
    "task": (["collect", "ant", "--root", "d"], "tasks: halfcheetah, hopper, walker2d"),
    "quality": (["collect", "hopper", "--root", "d", "--quality", "x"], "--quality='x'"),
}


@pytest.mark.parametrize("argv, said", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(argv, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "rl", *argv]) != 0
    error = capsys.readouterr().err
    assert error.startswith("statewright: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())


def test_other_settings_need_another_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("statewright.studies.rl.datasets.read", lambda source, task: recording())
    train = ["study", "rl", "train", "--data", "hopper_medium", "--output", "r.json", "--seed", "0"]
    small = ["--system", "bc/1", "--num-steps", "2", "--context", "4", "--hidden-size", "8"]
    assert main([*train, *small]) == 0
    assert main([*train, *small, "--batch-size", "7"]) != 0
    assert "--batch-size=32 (now 7)" in capsys.readouterr().err
    assert main([*train, *small, "--device", "abacus"]) != 0
    assert "--device abacus: cannot be used here" in capsys.readouterr().err
    about = json.loads(Path("r.json").read_text())["about"]
    assert about["study"] == "rl" and about["settings"]["context"] == 4
    assert Path("r.models/hopper-medium/bc/1/seed0.safetensors").is_file()
