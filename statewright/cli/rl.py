"""`statewright study rl`: offline reinforcement learning, from data to a table and a film."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import Verbs, options_of
from statewright.cli.show import console, line_of
from statewright.cli.show import table as show_table
from statewright.cli.types import COUNT, MODEL, SEED, TEXT
from statewright.studies.rl.scores import name_of, task_of
from statewright.studies.rl.settings import CollectSettings, DecisionSettings, EvaluateSettings

_RESULTS = click.argument("results", type=TEXT)


@click.group(cls=Verbs)
def rl() -> None:
    """Collect or bring data, train policies that act from a constant state, and evaluate them.

    \b
    Example: statewright study rl train --data hopper.hdf5 --output rl.json

    Needs the extra [rl]. Results go to one JSON file, models beside it; what is there is not done
    again, so the same command goes on where it was interrupted.
    """


def _said(config: type) -> dict[str, Any]:
    """The options of a settings class that stand on the command line."""
    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    return {
        f.name: context.params[f.name]
        for f in fields(config)
        if context.get_parameter_source(f.name) is given
    }


def _tell(event: dict[str, Any]) -> None:
    click.echo(line_of(event))


@rl.command()
@click.argument("task")
@click.option("--root", required=True, type=click.Path(), help="Where the Minari datasets go.")
@options_of(
    CollectSettings,
    {
        "quality": "medium, medium-replay or medium-expert.",
        "algorithm": "ppo, sac or td3, of Stable-Baselines3.",
        "steps": "Of the medium and of the expert part.",
        "medium_score": "Normalised score of the medium agent.",
        "expert_score": "Where the better agent's training ends.",
        "max_steps": "Most steps of training.",
        "save_every": "Training steps between checkpoints.",
        "seed": "Of the agent and its environments.",
    },
)
def collect(task: str, root: str, **chosen: Any) -> None:
    """Train an agent in TASK (halfcheetah, hopper, walker2d) and store what it does.

    \b
    Example: statewright study rl collect hopper --root data
    """
    from statewright.studies.rl.collect import Collection

    task_of(task)
    place = Collection(CollectSettings(task=task, **chosen), Path(root), _tell).run()
    click.echo(f"dataset in {place}")


@rl.command()
@click.option("--data", required=True, help="A D4RL .hdf5, or a Minari directory or id.")
@click.option("--name", help="Such as hopper-medium [default: read off --data].")
@click.option("--output", required=True, type=click.Path(), help="The JSON file of results.")
@click.option("--system", multiple=True, help="e.g. mingru/3: a name and a depth; repeat.")
@click.option("--seed", multiple=True, type=SEED, default=[0, 1, 2, 3, 4], show_default=True)
@click.option("--paper", is_flag=True, help="The paper's sizes, where not said otherwise.")
@click.option("--device", default="cpu", show_default=True)
@options_of(
    DecisionSettings,
    {
        "hidden_size": "Width.",
        "expansion": "State over width, minimal RNNs.",
        "dropout": "Dropout.",
        "num_steps": "Optimizer steps.",
        "batch_size": "Windows per step.",
        "context": "Time steps per window.",
        "learning_rate": "AdamW's, after the warm-up.",
        "warmup": "Steps of the warm-up.",
        "weight_decay": "AdamW's, on matrices only.",
        "clip": "Largest gradient norm.",
        "eval_every": "Steps between measurements.",
        "save_every": "Steps between checkpoints of a run.",
        "num_eval": "Held-out windows.",
    },
)
def train(**chosen: Any) -> None:
    """Train decision models, and behaviour cloning beside them, on one dataset.

    \b
    Example: statewright study rl train --data hopper.hdf5 --output rl.json
    """
    from statewright.studies.rl import study
    from statewright.studies.rl.datasets import read
    from statewright.studies.rl.systems import DEFAULT

    name = chosen["name"] or name_of(chosen["data"])
    base = DecisionSettings.paper_for(name) if chosen["paper"] else DecisionSettings()
    settings, output = replace(base, **_said(DecisionSettings)), Path(chosen["output"])
    recording = read(chosen["data"], task_of(name))
    systems, seeds = chosen["system"] or DEFAULT, chosen["seed"]
    place = _place(output, chosen["device"])
    models = _models(output)
    cells = study.train_cells(settings, recording, name, systems, seeds, place, models)
    _run(cells, output, settings, place)


@rl.command()
@_RESULTS
@click.option("--system", multiple=True, help="These alone, e.g. mingru/3; repeat.")
@click.option("--device", default="cpu", show_default=True)
@options_of(
    EvaluateSettings,
    {
        "episodes": "Per model.",
        "rows": "Episodes played at a time.",
        "target_return": "Asked of the models; 0: the best of their data.",
        "policy": "Bounds or repairs the state, e.g. tova:budget=48.",
    },
)
def evaluate(results: str, system: tuple[str, ...], device: str, **chosen: Any) -> None:
    """Play every trained model of RESULTS, and random actions, in the real task.

    \b
    Example: statewright study rl evaluate rl.json
    """
    from statewright.studies.experiment import read_study
    from statewright.studies.rl import study

    output, found = Path(results), read_study(results, study.NAME)
    place = _place(output, device)
    settings = EvaluateSettings(**chosen)
    cells = study.score_cells(found, _models(output), settings, place, system)
    _run(cells, output, None, place)
    _show([results])


@rl.command()
@click.argument("results", nargs=-1, required=True, type=TEXT)
def table(results: tuple[str, ...]) -> None:
    """Show the scores of one or more RESULTS beside the paper's.

    \b
    Example: statewright study rl table rl.json
    """
    _show(results)


@rl.command()
@click.argument("model", type=MODEL)
@click.argument("film", type=click.Path())
@click.option("--frames", type=COUNT, default=300, show_default=True, help="At most.")
@click.option("--target-return", type=float, default=0.0, help="0: the best of its data.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the environment.")
def render(model: str, film: str, frames: int, target_return: float, seed: int) -> None:
    """Let a stored MODEL act and write the FILM, a .gif or .mp4.

    \b
    Example: statewright study rl render rl.models/mingru hopper.gif
    """
    from statewright.studies.rl.environments import check_film, write_film
    from statewright.studies.rl.study import film as play

    check_film(film)
    if frames < 1:
        raise ValueError(f"frames={frames}, expected at least 1")
    played = play(model, target_return, seed, frames)
    write_film(played.frames, film)
    click.echo(f"{len(played.frames)} frames in {film}, return {played.returns[0]:,.1f}")


def _models(output: Path) -> Path:
    return output.with_name(f"{output.stem}.models")


def _place(output: Path, device: str) -> Any:
    import torch

    from statewright.studies.experiment import Place

    try:
        on = torch.device(device)
        torch.empty(0, device=on)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {device}: cannot be used here") from error
    return Place(output.with_name(f".{output.stem}.work"), on, _tell)


def _run(cells: list[Any], output: Path, settings: Any, place: Any) -> None:
    """Run what is missing. Training writes its settings into the file, and is held to them."""
    import sys

    from statewright.studies.cells import run_cells
    from statewright.studies.experiment import about, check_resumable
    from statewright.studies.rl.study import NAME

    told: dict[str, Any] = {}
    if settings is not None:
        check_resumable(output, NAME, settings)
        command = " ".join(["statewright", *sys.argv[1:]])
        told = about(NAME, settings, command, place.device)
    for key, result in run_cells(cells, output, told):
        click.echo(f"{key} done in {result['seconds']:,.0f} s")


def _show(results: Any) -> None:
    from statewright.studies.experiment import read_study
    from statewright.studies.rl.study import NAME, NOTE, table

    rows = table([read_study(path, NAME) for path in results])
    if not rows:
        raise ValueError("nothing was evaluated yet")
    cells = [[str(value) for value in row.values()] for row in rows]
    show_table(console(), "", list(rows[0]), cells)
    click.echo(NOTE)
