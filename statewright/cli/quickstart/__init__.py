"""`statewright quickstart`: one effect of each paper, on models that come with the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from statewright.cli.types import SEED, TEXT, Number

_OURS = ".quickstart"
RESULTS = "quickstart.json"
# Eight windows for the Transformer, and two readings for the diagnosis.
_LEAST = 12_288


@click.command()
@click.option("--text", type=TEXT, help="Any text file [default: Moby-Dick's beginning].")
@click.option("--output-dir", type=click.Path(), default="runs/quickstart", show_default=True)
@click.option(
    "--seconds",
    type=Number(0, above=True),
    default=60.0,
    show_default=True,
    help="About this long.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
def quickstart(text: str | None, output_dir: str, seconds: float, seed: int) -> None:
    """Show, in about a minute and without a download, what each of the four papers found.

    \b
    Example: statewright quickstart

    A collapsed Mamba-2 is diagnosed and repaired, a Transformer bounded, a minGRU trained by scan
    and read on with, the state of a GLA enlarged. The numbers are kept in quickstart.json.
    """
    whole = _text(text)
    if len(whole.encode()) < _LEAST:
        raise ValueError(
            f"{text}: {len(whole.encode()):,} bytes; quickstart needs at least {_LEAST:,}"
        )
    from rich.console import Console

    from statewright.cli.common import quiet_libraries
    from statewright.cli.quickstart.bound import bound
    from statewright.cli.quickstart.collapse import collapse
    from statewright.cli.quickstart.recall import recall
    from statewright.cli.quickstart.screen import Screen
    from statewright.cli.quickstart.train import go_back, make_run, read_on, train, write
    from statewright.session import Session

    quiet_libraries()
    directory = Path(output_dir)
    run = make_run(whole, directory, seed)
    _empty_own(directory)
    book = directory / "book.txt"
    book.write_text(whole, encoding="utf-8", newline="\n")
    screen = Screen(Console(highlight=False))
    found: dict[str, Any] = {}
    screen.step("repair", "a Mamba-2 that never learned to forget (Stuffed Mamba)")
    found["collapse"] = collapse(screen, whole.encode())
    screen.step("bound", "a Transformer's memory (Transformers are Multi-State RNNs)")
    found["bound"] = bound(screen, book)
    screen.step("train", "a minGRU by parallel scan (Were RNNs All We Needed?)")
    found["train"] = train(screen, run, seconds / 3)
    write(screen, Session(run.model, chunk=512), run.tokenizer)
    reader = Session(run.model, chunk=512)
    screen.step("read", "the rest in constant memory; fork, rewind, load")
    found["read"] = read_on(screen, reader, run)
    found["go back"] = go_back(screen, reader, directory)
    screen.step("enlarge", "the state of a GLA that looks up pairs (StateX)")
    found["recall"] = recall(screen, directory, seconds, seed)
    _keep(directory / RESULTS, found)
    screen.step("done", "next:")
    for line in (
        f"statewright generate {directory} --prompt 'Call me '",
        f"statewright diagnose demo:collapsed --text {book}",
        f"statewright size {directory} --context 32k",
        f"statewright train --text {book} --output-dir runs/mine",
    ):
        click.echo(f"   {line}")


def _text(path: str | None) -> str:
    from statewright import demos

    if path is None:
        return demos.text()
    from statewright.text_file import whole_text

    return whole_text(path)


def _empty_own(directory: Path) -> None:
    """Empty the directory of an earlier quickstart; never touch anybody else's."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / _OURS).exists():
            raise ValueError(f"{directory}: not empty, and not from an earlier quickstart")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _OURS).touch()


def _keep(path: Path, found: dict[str, Any]) -> None:
    from statewright.provenance import hardware, versions

    about = {"hardware": hardware(), **versions(("statewright", "torch", "transformers"))}
    text = json.dumps({"about": about, "effects": found}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
