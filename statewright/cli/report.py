"""`statewright report` and `statewright trace`: one page of results; what to draw on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import counted, json_option, show
from statewright.cli.types import COUNT, MODEL, POLICY, TEXT, Count
from statewright.demos import called


@click.command()
@click.argument("results", nargs=-1, required=True, type=TEXT)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The page (HTML).")
@click.option("--title", help="Its title [default: what the files hold].")
@json_option
def report(results: tuple[str, ...], out: str, title: str | None, as_json: bool) -> None:
    """Draw RESULTS, any result files of ours, as one self-contained page.

    \b
    Example: statewright report results.json --out page.html

    Of eval, study, capacity, diagnose --json, size --json, trace, and the examples. Tables, curves,
    heat maps, which tokens survive; no network, readable on a phone, in print and without a mouse.
    The same files give the same bytes.
    """
    from statewright.names import short_names
    from statewright.report.xray import page, read

    names = short_names(results)
    text = page([(names[name], read(name)) for name in results], title)
    _write(out, text)
    found = {"page": out, "bytes": len(text.encode()), "results": list(results)}
    said = f"{out}: {found['bytes']:,} bytes, of {counted(len(results), 'file')}"
    show(found, as_json, lambda to, _: to.print(said, soft_wrap=True))


@click.command()
@click.argument("model", type=MODEL)
@click.option("--text", required=True, type=TEXT, help="What is read.")
@click.option(
    "--policy", "policies", type=POLICY, multiple=True, help="e.g. tova:budget=64; repeatable."
)
@click.option("--length", type=Count(2), default=512, show_default=True, help="Tokens to read.")
@click.option("--every", type=COUNT, default=0, help="Tokens between looks [default: 64 looks].")
@click.option("--output", required=True, type=click.Path(dir_okay=False), help="Results (JSON).")
@json_option
def trace(
    model: str,
    text: str,
    policies: tuple[str, ...],
    length: int,
    every: int,
    output: str,
    as_json: bool,
) -> None:
    """Record what MODEL holds while it reads: tokens kept by each list, norms, bytes by kind.

    \b
    Example: statewright trace run --text book.txt --output trace.json

    Without a policy, and under each one given. `statewright report` draws the file.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.diagnosis.prompts import text_ids
    from statewright.evaluation.measure import environment
    from statewright.models.any_model import load_any
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.policies import build_policy
    from statewright.report.trace import trace as run
    from statewright.token_text import token_labels

    quiet_libraries()
    for policy in policies:
        build_policy(policy)  # a wrong one is refused before anything is loaded
    net, tokenizer = load_any(model), saved_tokenizer(model)
    ids = text_ids(Path(text), tokenizer, length).long()
    tokens = token_labels(tokenizer, ids)
    found = run(net, ids.to(net.device), tokens, policies, every)
    about: dict[str, Any] = {"model": called(model), "text": text}
    about |= {"command": " ".join(["statewright", *sys.argv[1:]]), **environment(net.device)}
    _write(output, json.dumps({**about, **found}, separators=(",", ":")) + "\n")
    summary = {"output": output, "tokens": len(tokens), "policies": ["none", *policies]}
    said = f"{counted(len(tokens), 'token')}, {counted(len(found['runs']), 'run')}"
    said = f"{output}: {said}\nnext: statewright report {output} --out report.html"
    show(summary, as_json, lambda to, _: to.print(said, soft_wrap=True))


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    import os

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
