"""The cells of the study: a model trained per system and seed, and its score in the real task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from statewright.studies.cells import Cell
from statewright.studies.experiment import Place, System, over_seeds, over_seeds_shown
from statewright.studies.fit import HELD_OUT, training_seed
from statewright.studies.rl.environments import make_environment
from statewright.studies.rl.episodes import Recording, Windows
from statewright.studies.rl.fit import DecisionFit, held_out_loss
from statewright.studies.rl.model import Behaviour, DecisionModel, Memory, RandomActions
from statewright.studies.rl.play import Played, play
from statewright.studies.rl.scores import (
    PAPER,
    SYSTEMS_OF_PAPER,
    ControlTask,
    task_of,
)
from statewright.studies.rl.settings import DecisionSettings, EvaluateSettings
from statewright.studies.rl.systems import Trained, build, load_model, save_model, systems

NAME = "rl"
NOTE = (
    "score: of 0 (random) to 100 (D4RL's expert); data: of the behaviour learnt from; bytes:\n"
    "carried per episode. D4RL and the paper used environments of version 2, ours are of 5, with\n"
    "other physics and rewards, and data that we collect are not D4RL's: compare ours with ours."
)
Make = Callable[[], Any]


def train_cells(
    settings: DecisionSettings,
    recording: Recording,
    dataset: str,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
    models: Path,
) -> list[Cell]:
    """`train/<dataset>/<system>/seed<n>`, each leaving its model as `model_path` says."""
    known, task = systems(settings), task_of(dataset)
    train, held_out = recording.check(task, dataset).split()
    for part in (train, held_out):
        part.draw(0, 1, settings.context)
    count = max(1, settings.num_eval // settings.batch_size)
    measured = [
        held_out.draw(HELD_OUT + i, settings.batch_size, settings.context) for i in range(count)
    ]

    def run(system: System, seed: int, key: str) -> dict[str, Any]:
        model = build(system, settings, task, seed).to(place.device)
        model.fit_scale(train)

        def batch(step: int) -> Windows:
            return train.draw(training_seed(seed, step), settings.batch_size, settings.context)

        result = DecisionFit(
            model,
            settings,
            seed,
            batch,
            lambda m: held_out_loss(m, measured),
            place.snapshot(key),
            lambda point: place.listen({"key": key, **point}),
        ).train()
        trained = Trained(model, dataset, float(recording.returns.max()))
        save_model(model_path(models, key), trained, system, settings)
        return {**result, **summary(recording, task)}

    parsed = [System.parse(name, known) for name in chosen]
    keyed = [(s, seed, f"train/{dataset}/{s}/seed{seed}") for seed in seeds for s in parsed]
    return [Cell(key, partial(run, s, seed, key)) for s, seed, key in keyed]


def summary(recording: Recording, task: ControlTask) -> dict[str, Any]:
    """What the data hold: steps, episodes, and the scores of their mean and best return."""
    returns = recording.returns
    return {
        "data_steps": len(recording),
        "data_episodes": len(returns),
        "data_score": task.score(float(returns.mean())),
        "data_best_return": float(returns.max()),
    }


def model_path(models: Path, key: str) -> Path:
    """Where the model of `train/<...>` lies."""
    return models / f"{key.removeprefix('train/')}.safetensors"


def score_cells(
    found: dict[str, Any],
    models: Path,
    settings: EvaluateSettings,
    place: Place,
    chosen: Sequence[str] = (),
    make: Callable[[ControlTask], Any] = make_environment,
) -> list[Cell]:
    """`score/<dataset>/<system>/seed<n>` of every trained model, and of random actions per seed.

    Episodes differ between seeds and are the same for all systems. Settings that are not the
    defaults stand in the key. chosen: these systems alone, without the random one. Raises
    ValueError if nothing of it was trained.
    """
    keys = [key for key in found["cells"] if key.startswith("train/")]
    if chosen:
        keys = [key for key in keys if key.split("/", 2)[2].rpartition("/")[0] in chosen]
    if not keys:
        raise ValueError("no such trained model in the results; train first")
    cells, random = [], {}
    for key in keys:
        name, _, seed = key.removeprefix("train/").rpartition("/seed")
        trained = partial(load_model, model_path(models, key))
        cells.append(_score_cell(name, int(seed), trained, settings, place, make))
        dataset = name.split("/")[0]
        if not chosen and settings.policy == "none" and (dataset, seed) not in random:
            untrained = partial(_random, dataset, int(seed))
            called = f"{dataset}/random"
            cell = _score_cell(called, int(seed), untrained, settings, place, make)
            random[dataset, seed] = cell
    return cells + list(random.values())


def _random(dataset: str, seed: int) -> Trained:
    task = task_of(dataset)
    return Trained(RandomActions(task.observation_size, task.action_size, seed), dataset, 0.0)


def _score_cell(
    name: str,
    seed: int,
    trained: Callable[[], Trained],
    settings: EvaluateSettings,
    place: Place,
    make: Callable[[ControlTask], Any],
) -> Cell:
    default = EvaluateSettings()
    said = [
        f"{label}={getattr(settings, label)}"
        for label in ("episodes", "target_return", "policy")
        if getattr(settings, label) != getattr(default, label)
    ]
    key = "/".join(["score", ":".join([name, *said]), f"seed{seed}"])

    def run() -> dict[str, Any]:
        loaded = trained()
        target = settings.target_return or loaded.best_return
        model = loaded.model.to(place.device).eval()
        behaviour = model if settings.policy == "none" else Bounded(model, settings.policy)
        seeds = [seed * 10_000 + i for i in range(settings.episodes)]
        played = play(behaviour, partial(make, loaded.task), target, seeds, settings.rows)
        result = outcome(played, loaded.task, target)
        place.listen({"key": key, "score": result["score"]})
        return result

    return Cell(key, run)


def outcome(played: Played, task: ControlTask, target: float) -> dict[str, Any]:
    """What a result keeps of the episodes played."""
    mean = sum(played.returns) / len(played.returns)
    return {
        "score": task.score(mean),
        "return": mean,
        "returns": played.returns,
        "lengths": played.lengths,
        "target_return": target,
        "state_bytes": played.state_bytes,
    }


@dataclass(frozen=True, eq=False)
class Bounded:
    """A decision model whose state a policy bounds or repairs at every step.

    Raises ValueError for a policy that has nothing to act on.
    """

    model: DecisionModel
    policy: str

    def __post_init__(self) -> None:
        if not isinstance(self.model, DecisionModel):
            raise ValueError(f"policy={self.policy!r}: this model has no state to bound")
        self.model.check_policy(self.policy)

    def begin(self, rows: int, target: float) -> Memory:
        return self.model.begin(rows, target)

    def act(self, *arguments: Any) -> tuple[Tensor, Memory]:
        return self.model.act(*arguments, policy=self.policy)


def table(files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per dataset and system: mean and deviation of the scores over seeds.

    data: the score of the behaviour learnt from. paper: its score. bytes: carried per episode.
    """
    cells = {key: r for found in files for key, r in found["cells"].items()}
    scored = {key: r for key, r in cells.items() if key.startswith("score/")}
    sizes = over_seeds(scored, lambda r: r["state_bytes"])
    data = {
        key.split("/")[1]: r["data_score"] for key, r in cells.items() if key.startswith("train/")
    }
    rows = []
    for key, values in over_seeds(scored, lambda r: r["score"]).items():
        _, dataset, system = key.split("/", 2)
        rows.append(
            {
                "dataset": dataset,
                "system": system,
                "seeds": len(values),
                "score": over_seeds_shown(values),
                "data": f"{data[dataset]:.1f}" if dataset in data else "",
                "paper": _of_paper(dataset, system),
                "bytes": f"{max(sizes[key]):,}",
            }
        )
    return sorted(rows, key=lambda row: row["dataset"])


def _of_paper(dataset: str, system: str) -> Any:
    name = system.partition("/")[0]
    if dataset not in PAPER or name not in SYSTEMS_OF_PAPER:
        return ""
    return PAPER[dataset][SYSTEMS_OF_PAPER.index(name)]


def film(path: str | Path, target: float, seed: int, frames: int, make: Make | None = None) -> Any:
    """Frames of one episode of a stored model, and what it achieved until then."""
    trained = load_model(path)
    behaviour: Behaviour = trained.model
    made = make or partial(make_environment, trained.task, render=True)
    return play(behaviour, made, target or trained.best_return, [seed], 1, frames)
