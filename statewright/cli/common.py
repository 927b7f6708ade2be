"""What several verbs share: numbers with k, options from a dataclass, and quiet libraries."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click


class Count(click.ParamType):
    """An integer; 64k is 65,536."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from statewright.spec import parse_int

        if isinstance(value, int):
            return value
        try:
            return parse_int(value)
        except ValueError:
            self.fail(f"{value!r} is not a count such as 512 or 64k", param, ctx)


COUNT = Count()


def options_of(config: type, helps: dict[str, str]) -> Callable:
    """Decorate a command with an option for each named field of a dataclass, its default shown."""
    hints = typing.get_type_hints(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}

    def decorate(command: Callable) -> Callable:
        for name, text in reversed(helps.items()):
            hint = hints[name]
            kind: Any = {int: COUNT, float: float}.get(hint)
            if kind is None:
                kind = click.Choice(typing.get_args(hint))
            command = click.option(
                f"--{name.replace('_', '-')}",
                type=kind,
                default=defaults[name],
                show_default=True,
                help=text,
            )(command)
        return command

    return decorate


def quiet_libraries() -> None:
    """No progress bars of transformers' between ours."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def human_bytes(count: float) -> str:
    """1,536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
