"""`statewright state`: look into state files."""

from __future__ import annotations

import click

from statewright.cli.types import TEXT


@click.group(no_args_is_help=False)
def state() -> None:
    """Look into state files: show one, or compare two."""


@state.command()
@click.argument("file", type=TEXT)
def show(file: str) -> None:
    """Show what FILE holds: whose state, tokens seen, every tensor with axes and bytes."""
    from rich.console import Console
    from rich.table import Table

    from statewright.state_file import read_state_file

    found = read_state_file(file)
    console = Console()
    table = Table(title=file, title_justify="left")
    table.add_column("tensor", no_wrap=True)
    for column in ("axes", "shape", "dtype", "bytes", "rms"):
        table.add_column(column, justify="right" if column in ("bytes", "rms") else "left")
    for name, tensor, axes in found.state.named():
        rms = tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
        table.add_row(
            name,
            " ".join(axes),
            " x ".join(map(str, tensor.shape)),
            str(tensor.dtype).removeprefix("torch."),
            f"{tensor.numel() * tensor.element_size():,}",
            f"{rms:.4g}" if tensor.is_floating_point() else "",
        )
    console.print(table)
    for label, value in (
        ("rows", found.state.batch_size),
        ("tokens seen", ", ".join(f"{n:,}" for n in found.state.seen.tolist())),
        ("bytes", f"{found.state.nbytes:,}"),
        ("policy", found.policy or "none"),
        ("model", (found.fingerprint or "any")[:16]),
        ("tokens hash", found.tokens_hash or "-"),
    ):
        console.print(f"{label:<12} {value}", highlight=False)


@state.command()
@click.argument("first", type=TEXT)
@click.argument("second", type=TEXT)
@click.pass_context
def diff(ctx: click.Context, first: str, second: str) -> None:
    """Compare two state files tensor by tensor; exit code 1 if they differ."""
    from rich.console import Console
    from rich.table import Table

    from statewright.state_file import read_state_file

    a, b = read_state_file(first), read_state_file(second)
    left, right = dict(a.state.items()), dict(b.state.items())
    table = Table(title=f"{first} against {second}", title_justify="left")
    table.add_column("tensor", no_wrap=True)
    for column in ("difference", "relative"):
        table.add_column(column)
    differs = a.fingerprint != b.fingerprint or a.tokens_hash != b.tokens_hash
    for name in sorted(left.keys() | right.keys()):
        entry = _difference(left.get(name), right.get(name))
        if entry is not None:
            differs = True
            table.add_row(name, *entry)
    console = Console()
    same = {True: "same", False: "different"}
    console.print(f"model   {same[a.fingerprint == b.fingerprint]}")
    console.print(f"tokens  {same[a.tokens_hash == b.tokens_hash]}")
    if table.row_count:
        console.print(table)
    else:
        console.print("tensors identical")
    ctx.exit(int(differs))


def _difference(a, b) -> tuple[str, str] | None:
    """(what differs, how much of the largest value); None when bit-identical."""
    import torch

    if a is None or b is None:
        return "only in one file", ""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} / {tuple(b.shape)} {b.dtype}", ""
    if torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b))):
        return None
    if not a.is_floating_point():
        return "values differ", ""
    gap = (a.double() - b.double()).abs().max().item()
    scale = max(a.double().abs().max().item(), b.double().abs().max().item())
    return f"{gap:.3g}", f"{gap / scale if scale else 0:.3g}"
