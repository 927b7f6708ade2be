"""`statewright state`: look into state files."""

from __future__ import annotations

from typing import Any

import click

from statewright.cli.common import Verbs
from statewright.cli.show import Column, json_option, show, table
from statewright.cli.types import TEXT


@click.group(cls=Verbs, no_args_is_help=False)
def state() -> None:
    """Look into state files: show one, or compare two.

    \b
    Example: statewright state show book.state
    """


@state.command("show")
@click.argument("file", type=TEXT)
@json_option
def show_(file: str, as_json: bool) -> None:
    """Show what FILE holds: whose state, tokens seen, every tensor with axes and bytes.

    \b
    Example: statewright state show book.state
    """
    from statewright.state_file import read_state_file

    found = read_state_file(file)
    about = {
        "file": file,
        "rows": found.state.batch_size,
        "seen": found.state.seen.tolist(),
        "bytes": found.state.nbytes,
        "policy": found.policy or "none",
        "model": found.fingerprint,
        "tokens_hash": found.tokens_hash,
        "tensors": [_tensor(*entry) for entry in found.state.named()],
    }
    show(about, as_json, _draw)


def _tensor(name: str, tensor: Any, axes: Any) -> dict[str, Any]:
    rms = None
    if tensor.is_floating_point():
        rms = tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
    return {
        "name": name,
        "axes": list(axes),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.numel() * tensor.element_size(),
        "rms": rms,
    }


def _draw(console: Any, about: dict[str, Any]) -> None:
    rows = [
        (
            tensor["name"],
            " ".join(tensor["axes"]),
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            f"{tensor['bytes']:,}",
            "" if tensor["rms"] is None else f"{tensor['rms']:.4g}",
        )
        for tensor in about["tensors"]
    ]
    numbers = Column("bytes", number=True), Column("rms", number=True)
    table(console, about["file"], ["tensor", "axes", "shape", "dtype", *numbers], rows)
    for label, value in (
        ("rows", about["rows"]),
        ("tokens seen", ", ".join(f"{n:,}" for n in about["seen"])),
        ("bytes", f"{about['bytes']:,}"),
        ("policy", about["policy"]),
        ("model", (about["model"] or "any")[:16]),
        ("tokens hash", about["tokens_hash"] or "-"),
    ):
        console.print(f"{label:<12} {value}", soft_wrap=True)


@state.command()
@click.argument("first", type=TEXT)
@click.argument("second", type=TEXT)
@json_option
@click.pass_context
def diff(ctx: click.Context, first: str, second: str, as_json: bool) -> None:
    """Compare two state files tensor by tensor; exit code 1 if they differ.

    \b
    Example: statewright state diff monday.state tuesday.state
    """
    from statewright.state_file import read_state_file

    a, b = read_state_file(first), read_state_file(second)
    left, right = dict(a.state.items()), dict(b.state.items())
    pairs = {name: (left.get(name), right.get(name)) for name in sorted(left.keys() | right.keys())}
    tensors = {
        name: dict(zip(("difference", "relative"), entry))
        for name, pair in pairs.items()
        if (entry := _difference(*pair)) is not None
    }
    found = {
        "files": [first, second],
        "same_model": a.fingerprint == b.fingerprint,
        "same_tokens": a.tokens_hash == b.tokens_hash,
        "tensors": tensors,
    }
    show(found, as_json, _draw_difference)
    ctx.exit(int(bool(tensors) or not (found["same_model"] and found["same_tokens"])))


def _draw_difference(console: Any, found: dict[str, Any]) -> None:
    same = {True: "same", False: "different"}
    console.print(f"model   {same[found['same_model']]}")
    console.print(f"tokens  {same[found['same_tokens']]}")
    if not found["tensors"]:
        console.print("tensors identical")
        return
    rows = [(name, *entry.values()) for name, entry in found["tensors"].items()]
    columns = "tensor", Column("difference", words=True), "relative"
    table(console, " against ".join(found["files"]), columns, rows)


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
