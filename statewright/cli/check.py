"""`statewright check`: the laws on any causal LM; the exit code is for CI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import Column, console, emit, json_option, table
from statewright.cli.types import FAMILY, MODEL
from statewright.demos import called

_DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")
_STYLES = {"ok": "green", "WRONG": "bold red", "raises": "yellow", "not supported": "dim"}


@click.command()
@click.argument("model", required=False, type=MODEL)
@click.option(
    "--family", type=FAMILY, help="Check a tiny random model of this family (see docs/check.md)."
)
@click.option("--all", "every", is_flag=True, help="Check a tiny model of every known family.")
@click.option("--only", help="Only these checks, comma-separated.")
@click.option(
    "--require",
    help="Checks that must be ok, comma-separated: else exit code 1. Default: "
    "fold,chunk,fork,save (nothing with --all).",
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where to run, e.g. cuda.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a checkpoint brings.")
@json_option
@click.option("--markdown", type=click.Path(), help="Write the table as a page to this file.")
@click.pass_context
def check(ctx: click.Context, model: str | None, **options: Any) -> None:
    """Check the state of MODEL: an id, a directory, or with --family no model at all.

    \b
    Example: statewright check --family mamba2

    Does it continue from its state? In chunks, padded, packed, forked, saved, in a batch, in
    bfloat16, with gradients? WRONG means silently wrong, by the share of the error that
    ignoring the state altogether would make.
    """
    given = [name for name in (model, options["family"], options["every"] or None) if name]
    if len(given) != 1:
        raise click.UsageError("give exactly one of MODEL, --family and --all")
    from statewright.checks.report import REQUIRED

    required = _names(options["require"]) or (() if options["every"] else REQUIRED)
    names = _wanted(options["only"], required, bool(options["require"]))
    required = [name for name in required if name in names]
    with nullcontext() if model else _one_thread():
        reports = [_report(*entry, names, options["device"]) for entry in _models(model, options)]
    if options["markdown"]:
        from statewright.checks.page import markdown

        Path(options["markdown"]).write_text(markdown(reports), encoding="utf-8")
    if options["as_json"]:
        emit(_as_json(reports, required))
    else:
        _show(console(), reports, required)
    ctx.exit(int(any(report.failed(required) for report in reports)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiny models run much slower on several threads, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _wanted(only: str | None, required: Any, was_given: bool) -> list[str]:
    """The checks to run, in their order; a required one is run in any case."""
    from statewright.checks.checks import CHECKS

    wanted = _names(only) or tuple(CHECKS)
    if was_given:
        wanted += tuple(required)
    for name in wanted:
        if name not in CHECKS:
            raise ValueError(f"unknown check {name!r} (known: {', '.join(CHECKS)})")
    return [name for name in CHECKS if name in wanted]


def _models(model: str | None, options: dict[str, Any]) -> Any:
    """Yield (name, model); built one at a time, since a model may be large."""
    from statewright.cli.common import quiet_libraries

    quiet_libraries()
    if model is not None:
        import torch

        from statewright.models.any_model import load_any

        name = options["dtype"]
        dtype = None if name == "auto" else getattr(torch, name)
        yield called(model), load_any(model, dtype, options["trust_remote_code"])
        return
    from statewright.hf.families import FAMILIES, tiny

    for family in FAMILIES if options["every"] else (options["family"],):
        try:
            net = tiny(family)
        except ValueError as error:
            if not options["every"]:
                raise
            click.echo(f"{family}: left out ({' '.join(str(error).split())})", err=True)
            continue
        yield family, net


def _report(name: str, net: Any, names: list[str], device: str) -> Any:
    from statewright.checks.report import check as run

    try:
        net = net.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {' '.join(str(error).split())[:120]}") from error
    return run(net, name, names)


def _as_json(reports: list[Any], required: list[str]) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found = []
    for report in reports:
        failed = report.failed(required)
        found.append({**report.as_dict(), "required": required, "failed": failed})
    return {"versions": versions, "machine": platform.machine(), "models": found}


def _show(console: Any, reports: list[Any], required: list[str]) -> None:
    from rich.text import Text

    from statewright.checks.report import words

    columns = "check", "verdict", Column("error", number=True), Column("note", words=True)
    for report in reports:
        rows = []
        for name, cell in report.cells.items():
            error = "" if cell.error is None else f"{cell.error:.1e}"
            verdict = Text(cell.verdict, style=_STYLES[cell.verdict])
            rows.append((f"{name} *" if name in required else name, verdict, error, cell.note))
        table(console, f"{report.name} ({report.model})", columns, rows)
        console.print(words(report))
        failed = report.failed(required)
        if failed:
            console.print(f"not met: {', '.join(failed)} (required: {', '.join(required)})")
