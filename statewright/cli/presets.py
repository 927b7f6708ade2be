"""`--preset`: a named set of options; those given on the command line come first."""

from __future__ import annotations

from typing import Any

import click

from statewright.train.presets import PRESETS


def _apply(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    if name is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[name]}
    return name


def preset_option(command: Any) -> Any:
    """Decorate a command whose options are those of TrainConfig."""
    return click.option(
        "--preset",
        type=click.Choice(sorted(PRESETS)),
        is_eager=True,
        callback=_apply,
        help="Options by name: statex is post-training after resize, or its control without.",
    )(command)
