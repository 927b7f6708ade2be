"""What several verbs share: numbers with k, options from a dataclass, and quiet libraries."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
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


class Bytes(click.ParamType):
    """A number of bytes: 512MiB, 32GiB, 16GB or a plain integer."""

    name = "bytes"
    _units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
        if found is None or found[2] not in self._units:
            self.fail(f"{value!r} is not a size such as 512MiB or 32GiB", param, ctx)
        return int(float(found[1]) * self._units[found[2]])


BYTES = Bytes()


class Sizes(Bytes):
    """Several numbers of bytes, with commas between: 64KiB,1MiB."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        return tuple(super(Sizes, self).convert(one, param, ctx) for one in value.split(","))


SIZES = Sizes()


class Model(click.ParamType):
    """A directory, an id, or a name of `hf.pretrained`, which becomes its directory."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from statewright.hf.pretrained import locate

        return str(locate(value))


MODEL = Model()
PARALLEL = "Processes that share the cells; ray, or ray://host:port of a cluster."


class Verbs(click.Group):
    """A group whose verbs' mistakes are told in the words of the command line: --learning-rate."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            verb = self.commands.get(ctx.invoked_subcommand or "")
            raise ValueError(in_options(str(error), verb.params if verb else [])) from error


def in_options(text: str, params: Sequence[click.Parameter]) -> str:
    """`learning_rate=-1, expected ...` with --learning-rate, if that is one of the options."""
    known = {p.name: p.opts[0] for p in params if p.opts[0].startswith("--")}

    def renamed(match: re.Match[str]) -> str:
        return f"{known[match[1]]}=" if match[1] in known else match[0]

    return re.sub(r"(?<!\S)(?:config: )?(\w+)=", renamed, text)


def options_of(config: type, helps: dict[str, str]) -> Callable:
    """Decorate a command with an option for each named field of a dataclass, its default shown."""
    hints = typing.get_type_hints(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}

    def decorate(command: Callable) -> Callable:
        for name, text in reversed(helps.items()):
            hint = hints[name]
            kind: Any = {int: COUNT, float: float, str: str, bool: bool}.get(hint)
            if kind is None:
                kind = click.Choice(typing.get_args(hint))
            command = click.option(
                f"--{name.replace('_', '-')}",
                type=kind,
                is_flag=hint is bool,
                default=defaults[name],
                show_default=bool(defaults[name]) or hint not in (bool, str),
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


def device_of(name: str) -> Any:
    """The torch device of `--device`; UsageError if it cannot be used here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name}: cannot be used here") from error
    return device
