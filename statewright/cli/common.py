"""What several verbs share: numbers with k, options from a dataclass, and quiet libraries."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click

from statewright.cli.types import COUNT, POLICY, SEED

# Fields that mean the same wherever they stand.
_TYPES = {"policy": POLICY, "seed": SEED}

PARALLEL = "Processes that share the cells; ray, or ray://host:port of a cluster."


class Verbs(click.Group):
    """A group that lists its verbs under headings, each with its whole first sentence.

    Their mistakes are told in the words of the command line: --learning-rate.
    """

    def __init__(self, *args: Any, sections: dict[str, tuple[str, ...]] | None = None, **options):
        super().__init__(*args, **options)
        self.sections = sections

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in (self.sections or {"Commands": tuple(self.commands)}).items():
            with formatter.section(title):
                formatter.write_dl([(n, first_sentence(self.commands[n])) for n in names])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            verb = self.commands.get(ctx.invoked_subcommand or "")
            raise ValueError(in_options(str(error), verb.params if verb else [])) from error


def first_sentence(command: click.Command) -> str:
    """What a command does: its help up to the first full stop before a space."""
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


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
            plain: Any = {int: COUNT, float: float, str: str, bool: bool}.get(hint)
            kind = _TYPES.get(name, plain)
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


def mixers_of(config: Any) -> str:
    """The mixer of a config, or those that its layers go through in turn."""
    return config.mixer if isinstance(config.mixer, str) else ", ".join(config.mixer)


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
