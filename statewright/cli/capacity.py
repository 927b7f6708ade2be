"""`statewright capacity`: how long to train, and how far to recall, by the size of a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import PARALLEL, device_of, options_of
from statewright.cli.show import Column, console, grid, table
from statewright.cli.types import POSITIVE, SEED, TEXT
from statewright.studies.capacity_settings import SYSTEMS, CapacitySettings

RECALL_LENGTHS = (256,)

_HELPS = {
    "hidden_size": "Width.",
    "num_layers": "Depth.",
    "head_dim": "Of Mamba-2's heads and of the Transformer's.",
    "decay_scale": "low-decay: the initial decay rate A, times this.",
    "num_steps": "Optimizer steps of every cell.",
    "tokens_per_step": "Every training length divides it.",
    "learning_rate": "AdamW's highest, cosine after a warm-up.",
    "times": "Read texts of so many training lengths.",
    "read_length": "Read texts of so many tokens instead, whatever the training length.",
    "num_texts": "Held-out texts, side by side.",
    "held_out_share": "Of the text, at its end.",
    "explosion": "Perplexity beyond the training length over that within: a collapse.",
    "passkey_share": "Of the training rows; they hold a key to recall.",
    "tokens": "Of keys alone: bytes, or one token per word.",
    "easy_steps": "Steps until a key is said but once in its text.",
    "passing_steps": "More steps by state passing; recall is measured before and after.",
    "passing_segments": "Training lengths of the longest texts of these; 1: more steps alone.",
    "passing_rate": "Their learning rate [default: the same].",
    "longest_recall": "Tokens of the longest passkey text; 0: no recall.",
    "num_eval": "Passkey texts per length.",
    "recall_threshold": "Accuracy that counts as recall.",
    "save_every": "Steps between snapshots of a cell.",
}


@click.command()
@click.option("--text", type=TEXT, help="Trained on, and read, as bytes; see --recall.")
@click.option("--recall", is_flag=True, help="Keys alone, without a text; sets what is not given.")
@click.option("--parallel", default="1", show_default=True, help=PARALLEL)
@click.option("--output", required=True, type=click.Path(), help="The JSON file; resumed.")
@click.option("--figure", type=click.Path(), help="Also draw it: .png, .svg or .pdf.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    default=["4", "8", "16", "32", "64"],
    show_default=True,
    help="d_state, or state=16:heads=3:width=96:depth=2; repeat.",
)
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=POSITIVE,
    default=[128, 256, 512, 1024],
    show_default=True,
    help="Training length, a power of two; repeat.",
)
@click.option("--seed", multiple=True, type=SEED, default=[0], show_default=True)
@click.option(
    "--system",
    multiple=True,
    default=SYSTEMS,
    show_default=True,
    help="The first is fitted, the others are controls; repeat.",
)
@click.option(
    "--controls-at",
    type=click.Choice(["largest", "all"]),
    default="largest",
    show_default=True,
    help="Sizes at which the controls are trained.",
)
@click.option("--device", default="cpu", show_default=True)
@options_of(CapacitySettings, _HELPS)
@click.pass_context
def capacity(ctx: click.Context, output: str, figure: str | None, **chosen: Any) -> None:
    """Measure what a state can hold: state sizes x training lengths x seeds of a Mamba-2.

    \b
    Example: statewright capacity --text book.txt --output capacity.json

    T_forget: the least training length beyond which a model reads on unharmed, as an interval;
    T_recall: the longest text from which it recalls a key, and T_passed, after state passing. The
    laws are fitted through five sizes or more, beside the published ones (arXiv:2410.07145), a
    Mamba-2 of the official initialisation and a Transformer of equal parameters, data and steps.
    --recall needs no text. What OUTPUT holds is not run again.
    """
    import shutil

    from statewright.studies.cells import run_cells
    from statewright.studies.experiment import check_resumable, read_study
    from statewright.studies.figures import check_drawable, draw

    settings, path, to = _settings(ctx, chosen), Path(output), console()
    check_resumable(path, "capacity", settings)
    if figure:
        check_drawable(figure)
    work = path.with_name(f".{path.stem}.work")
    with _live(to, path) as (listen, renew):
        cells, about, runner = _study(path, settings, chosen, work, listen)
        todo = len(cells)
        for done, (key, result) in enumerate(run_cells(cells, path, about, runner), 1):
            renew(key, result, done, todo)
    if not any(work.rglob("*.safetensors")):
        shutil.rmtree(work, ignore_errors=True)
    _show(to, read_study(path, "capacity"))
    if figure:
        draw(path, figure)
        click.echo(f"figure in {figure}")


def _settings(ctx: click.Context, chosen: dict[str, Any]) -> CapacitySettings:
    """With --recall, what is not given is that preset's."""
    if not chosen["recall"]:
        return CapacitySettings(**{name: chosen[name] for name in _HELPS})
    given = click.core.ParameterSource.COMMANDLINE

    def is_given(name: str) -> bool:
        return ctx.get_parameter_source(name) is given

    if chosen["text"]:
        raise ValueError("--recall trains on keys alone; leave out --text")
    if not is_given("lengths"):
        chosen["lengths"] = RECALL_LENGTHS
    said = {name: chosen[name] for name in _HELPS if is_given(name)}
    return replace(CapacitySettings.recall_alone(), **said)


def _study(
    path: Path,
    settings: CapacitySettings,
    chosen: dict[str, Any],
    work: Path,
    listen: Callable[[dict[str, Any]], None],
) -> tuple[list, dict[str, Any], Any]:
    """The cells that are missing, what the results must carry, and what runs them."""
    import sys

    from statewright.models.tokenizers import byte_tokenizer
    from statewright.studies.capacity import NAME, Study, check_same_text, grid
    from statewright.studies.capacity_settings import Shape
    from statewright.studies.cells import read_cells
    from statewright.studies.experiment import Place, about
    from statewright.studies.sweep import quiet, runner_of
    from statewright.text_file import read_text
    from statewright.train.data import corpus_of

    shapes = [Shape.parse(size) for size in chosen["sizes"]]
    if len(set(shapes)) < len(shapes) or len(set(chosen["seed"])) < len(chosen["seed"]):
        raise ValueError("capacity: a --size or a --seed is given twice")
    device, corpus = device_of(chosen["device"]), None
    if chosen["text"]:
        corpus = corpus_of([read_text(chosen["text"])], byte_tokenizer())
    command = " ".join(["statewright", *sys.argv[1:]])
    carried = about(NAME, settings, command, device)
    if corpus is not None:
        check_same_text(path, corpus.fingerprint)
        carried["text"] = corpus.fingerprint
    place = Place(work, device, listen)
    study = Study(settings, chosen["lengths"], corpus, place)
    wanted = shapes, chosen["seed"], chosen["system"], chosen["controls_at"]
    cells = study.cells(*wanted)
    # Workers make the cells again: theirs have nobody to tell.
    recipe = partial(
        grid, settings, chosen["lengths"], corpus, replace(place, listen=quiet), *wanted
    )
    runner = runner_of(chosen["parallel"], recipe, device.type == "cuda")
    there = read_cells(path)["cells"]
    return [cell for cell in cells if cell.key not in there], carried, runner


@contextmanager
def _live(console: Any, path: Path) -> Iterator[tuple[Callable, Callable]]:
    """Yields (listen, renew): the table so far on a terminal, a line per cell elsewhere."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from statewright.studies.cells import read_cells

    seconds: list[float] = []
    if not console.is_terminal:

        def tell(key: str, result: dict[str, Any], done: int, todo: int) -> None:
            line = f"{key}: {_outcome(result)}, {result['seconds']} s"
            console.print(f"{line}  ({done} of {todo})", soft_wrap=True)

        yield lambda point: None, tell
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def shown(line: str) -> Group:
            return Group(grid(*_table(read_cells(path))), Text(line))

        def listen(point: dict[str, Any]) -> None:
            live.update(shown(f"{point['key']}  step {point['step']}  {point['train_loss']:.3f}"))

        def renew(key: str, result: dict[str, Any], done: int, todo: int) -> None:
            seconds.append(result["seconds"])
            left = sum(seconds) / done * (todo - done) / 60
            live.update(shown(f"{done} of {todo} cells, about {left:,.0f} minutes left"))

        yield listen, renew


def _outcome(result: dict[str, Any]) -> str:
    """A cell's measurements in a line."""
    said = ["diverged"] if result.get("diverged") else []
    if "ratio" in result:
        said.append(f"ratio {result['ratio']:.3g}")
    parts = {"recall": result, "passed": result.get("passed", {})}
    for name, part in parts.items():
        if part.get("recall"):
            shares = " ".join(f"{n}:{share:.2f}" for n, share in part["recall"].items())
            said.append(f"{name} {shares}")
    return ", ".join(said)


def _table(found: dict[str, Any]) -> tuple[list[Column], list[tuple[str, ...]]]:
    from statewright.studies.capacity_table import rows

    made = rows(found)
    names = made[0] if made else {}
    columns = [Column(name, number=name not in ("system", "size")) for name in names]
    return columns, [tuple(row.values()) for row in made]


def _show(console: Any, found: dict[str, Any]) -> None:
    from statewright.studies.capacity_table import said

    table(console, "", *_table(found))
    for line in said(found):
        console.print(line)
