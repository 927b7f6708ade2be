"""`statewright study`: the experiments of the minimal-RNN paper, each a file of results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import PARALLEL, Verbs, device_of, options_of
from statewright.cli.rl import rl
from statewright.cli.show import console, line_of, table
from statewright.cli.types import POLICY, SEED, SIZES, TEXT, Names
from statewright.studies.equal_bytes_settings import TASKS, EqualBytesSettings
from statewright.studies.settings import (
    CharLMSettings,
    ChomskySettings,
    ListOpsSettings,
    SelectiveCopySettings,
    TrainCostSettings,
)

_TRAINING = {
    "hidden_size": "Width.",
    "expansion": "State over width, minimal RNNs.",
    "dropout": "Dropout.",
    "num_steps": "Optimizer steps.",
    "batch_size": "Rows per step.",
    "learning_rate": "AdamW's, constant.",
    "weight_decay": "AdamW's, on matrices only.",
    "clip": "Largest gradient norm.",
    "eval_every": "Steps between measurements.",
    "save_every": "Steps between checkpoints of a run.",
    "num_eval": "Held-out samples.",
    "stop_at": "End a run at this held-out accuracy.",
    "dtype": "What products are computed in; weights and states stay float32.",
}


@click.group(cls=Verbs)
def study() -> None:
    """Repeat the experiments of "Were RNNs All We Needed?", at a scale for 2 cores or the paper's.

    \b
    Example: statewright study selective-copy --output copy.json

    Results go to one JSON file; what it holds is not run again, so an interrupted study goes on
    where it was. Other settings need another file.
    """


study.add_command(rl)


def _common(command: Callable) -> Callable:
    options = (
        click.option("--output", required=True, type=click.Path(), help="The JSON file."),
        click.option("--figure", type=click.Path(), help="Also draw it: .png, .svg or .pdf."),
        click.option("--system", multiple=True, help="e.g. mingru/3: a name and a depth; repeat."),
        click.option("--seed", multiple=True, type=SEED, default=[0], show_default=True),
        click.option("--paper", is_flag=True, help="The paper's sizes, where not said otherwise."),
        click.option("--device", default="cpu", show_default=True),
        click.option("--parallel", default="1", show_default=True, help=PARALLEL),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _run(name: str, kind: type, chosen: dict[str, Any], **more: Any) -> None:
    """Run the study's missing cells, then show its table and draw its figure."""
    import importlib
    import shutil
    import sys
    from dataclasses import fields, replace
    from functools import partial

    from statewright.studies.cells import run_cells
    from statewright.studies.experiment import Place, about, check_resumable, read_study
    from statewright.studies.figures import check_drawable
    from statewright.studies.sweep import quiet, runner_of

    ctx, to = click.get_current_context(), console()
    module = importlib.import_module(f"statewright.studies.{name.replace('-', '_')}")
    given = click.core.ParameterSource.COMMANDLINE
    said = {
        f.name: chosen[f.name]
        for f in fields(kind)
        if f.name in chosen and ctx.get_parameter_source(f.name) is given
    }
    settings = replace(kind.paper() if chosen["paper"] else kind(), **said)
    output, device = Path(chosen["output"]), device_of(chosen["device"])
    check_resumable(output, name, settings)
    if chosen["figure"]:
        check_drawable(chosen["figure"])
    work = output.with_name(f".{output.stem}.work")

    def listen(point: dict[str, Any]) -> None:
        to.print(line_of(point), soft_wrap=True)

    wanted = settings, chosen["system"] or module.DEFAULT, chosen["seed"]
    make = partial(module.cells, *wanted, **more)
    recipe, cells = (partial(make, place=Place(work, device, hear)) for hear in (quiet, listen))
    runner = runner_of(chosen["parallel"], recipe, device.type == "cuda")
    told = about(name, settings, " ".join(["statewright", *sys.argv[1:]]), device)
    for key, result in run_cells(cells(), output, told, runner):
        to.print(f"{key} done in {result['seconds']:,.0f} s", soft_wrap=True)
    if not any(work.rglob("*.safetensors")):
        shutil.rmtree(work, ignore_errors=True)
    _show(to, module, read_study(output, name))
    if chosen["figure"]:
        _draw(output, chosen["figure"])


def _show(console: Any, module: Any, found: dict[str, Any]) -> None:
    rows = module.table(found)
    if rows:
        cells = [[str(row.get(name, "")) for name in rows[0]] for row in rows]
        table(console, "", list(rows[0]), cells)
    if hasattr(module, "NOTE"):
        console.print(module.NOTE)


def _draw(results: str | Path, figure: str) -> None:
    from statewright.studies.figures import draw

    draw(results, figure)
    click.echo(f"figure in {figure}")


@study.command("selective-copy")
@_common
@options_of(
    SelectiveCopySettings,
    {"length": "Tokens before the markers.", "tokens": "Tokens to copy.", **_TRAINING},
)
def selective_copy(**chosen: Any) -> None:
    """Copy marked tokens out of noise: minimal RNNs by depth, and time-invariant systems.

    \b
    Example: statewright study selective-copy --output copy.json
    """
    _run("selective-copy", SelectiveCopySettings, chosen)


@study.command("char-lm")
@_common
@click.option("--text", required=True, type=TEXT, help="The text; Tiny Shakespeare.")
@options_of(
    CharLMSettings,
    {
        "context": "Characters per window.",
        "num_heads": "Of the Transformer.",
        "patience": "End a run after so many measurements without a lower loss; 0: never.",
        **_TRAINING,
    },
)
def char_lm(text: str, **chosen: Any) -> None:
    """Compare character language models: loss against steps.

    \b
    Example: statewright study char-lm --text book.txt --output lm.json
    """
    _run("char-lm", CharLMSettings, chosen, text=text)


@study.command("chomsky")
@_common
@click.option(
    "--task",
    type=Names("statewright.tasks.chomsky:CHOMSKY", "task"),
    multiple=True,
    help="e.g. even-pairs; repeat [default: all six].",
)
@options_of(ChomskySettings, {"train_length": "Longest word to train on.", **_TRAINING})
def chomsky(task: tuple[str, ...], **chosen: Any) -> None:
    """Train on short words of the Chomsky hierarchy's tasks, and test on long ones.

    \b
    Example: statewright study chomsky --task majority --output words.json
    """
    more = {"tasks": task} if task else {}
    _run("chomsky", ChomskySettings, chosen, **more)


@study.command("listops")
@_common
@options_of(ListOpsSettings, {"train_length": "Longest expression to train on.", **_TRAINING})
def listops(**chosen: Any) -> None:
    """Train on short nested operations on digits, and test on long ones.

    \b
    Example: statewright study listops --output listops.json
    """
    _run("listops", ListOpsSettings, chosen)


@study.command("train-cost")
@_common
@options_of(
    TrainCostSettings,
    {
        "batch_size": "Rows.",
        "hidden_size": "Width.",
        "num_layers": "Depth of every system.",
        "repeats": "Times each is run after a warm-up; the best counts.",
        "shortest": "First length in tokens; doubled from there.",
        "longest": "Last length at most.",
    },
)
def train_cost(**chosen: Any) -> None:
    """Measure a training step's time and memory against length, by loop and by fused kernel.

    \b
    Example: statewright study train-cost --output cost.json
    """
    _run("train-cost", TrainCostSettings, chosen)


@study.command("equal-bytes")
@_common
@click.option("--task", multiple=True, type=click.Choice(TASKS), help="[default: mqar, copying]")
@click.option("--bytes", "sizes", type=SIZES, help="E.g. 4KiB,16KiB [default: 4 to 32 KiB].")
@click.option(
    "--policy", "policies", type=POLICY, multiple=True, help="Without a budget, e.g. tova; repeat."
)
@options_of(
    EqualBytesSettings,
    {
        "tolerance": "A model is at a size if its bytes are that close.",
        "max_parameters": "What needs more is not trained.",
        "grow": "Of the expanded Mamba-2, after half of the steps.",
        "num_heads": "Of the Transformer, GLA and Mamba-2.",
        "mlp_ratio": "Of every block.",
        "pairs": "mqar: keys with values.",
        "length": "mqar: tokens.",
        "vocab": "mqar: ids.",
        "copy_length": "copying: tokens before the markers.",
        "copy_tokens": "copying: tokens to copy.",
        **{name: text for name, text in _TRAINING.items() if name != "expansion"},
    },
)
def equal_bytes(task: tuple[str, ...], **chosen: Any) -> None:
    """Train every family at the same bytes of state: recall against bytes.

    \b
    Example: statewright study equal-bytes --output bytes.json
    """
    _run("equal-bytes", EqualBytesSettings, chosen, **({"tasks": task} if task else {}))


@study.command("figure")
@click.argument("results", type=TEXT)
@click.argument("figure", type=click.Path())
def figure_(results: str, figure: str) -> None:
    """Draw the FIGURE of a study from its RESULTS, and from nothing else.

    \b
    Example: statewright study figure copy.json copy.png
    """
    _draw(results, figure)
