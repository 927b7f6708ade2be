"""`statewright demo`: small models and a text to try every verb on."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(), metavar="DIR")
def demo(directory: str) -> None:
    """Write three small models and a text into DIR, to try the other verbs on.

    \b
    Example: statewright demo demo

    The models are also known by name wherever a verb takes a model: demo:collapsed,
    demo:transformer and demo:recall.
    """
    from statewright.cli.common import human_bytes
    from statewright.demos import MODELS, TEXT, write

    for path in write(directory):
        if path.name == TEXT:
            click.echo(f"{path}  the beginning of Moby-Dick, {human_bytes(path.stat().st_size)}")
        else:
            click.echo(f"{path}  {MODELS[path.name]}")
    book = Path(directory) / TEXT
    click.echo(f"\nnext:\n  statewright diagnose demo:collapsed --text {book}")
    click.echo("  statewright generate demo:collapsed --prompt 'Call me '")
    task = f"perplexity:length=512:text={book}"
    click.echo(f"  statewright eval demo:transformer --task {task} --policy tova:budget=32")
