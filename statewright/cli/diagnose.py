"""`statewright diagnose`: is the memory of a recurrent model healthy, and if not, what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import Column, console, emit, json_option, table
from statewright.cli.types import COUNT, MODEL, POLICY, POSITIVE, TEXT, Names
from statewright.demos import called

_STYLES = {"healthy": "green", "collapse": "bold red", "amnesia": "bold red", "data": "yellow"}


@click.command()
@click.argument("model", type=MODEL)
@click.option("--text", required=True, type=TEXT, help="A text the model should know.")
@click.option("--length", type=COUNT, help="Tokens to read [default: 64k, or the whole text].")
@click.option("--train-length", type=COUNT, help="Tokens of one training text, if not recorded.")
@click.option(
    "--rows", type=POSITIVE, default=1, show_default=True, help="Places read side by side."
)
@click.option(
    "--prompts",
    type=Names("statewright.diagnosis.prompts:PROMPTS", "prompt", several=True),
    default="text,newlines,random,passkey",
    show_default=True,
    help="What to read; the text decides, the others are witnesses.",
)
@click.option(
    "--policy", type=POLICY, help="Read again under this policy, e.g. forgetmore:decay=0.99."
)
@click.option("--report", type=click.Path(), help="Write one self-contained page to this file.")
@json_option
def diagnose(model: str, text: str, policy: str | None, report: str | None, **options: Any) -> None:
    """Say whether MODEL forgets too little, too much, or reads on for ever.

    \b
    Example: statewright diagnose run --text book.txt

    Losses by position, and the state of every recurrent layer and head on the way: healthy,
    collapse (does not forget), amnesia (forgets too fast), or a shift of data or positions.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.diagnosis.prompts import rows_of_text
    from statewright.diagnosis.train_length import train_length_of
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.policies import build_policy

    quiet_libraries()
    build_policy(policy)  # a wrong one is refused before anything is loaded
    prompts = [name.strip() for name in options["prompts"].split(",") if name.strip()]
    net = load_model(model)
    train_length = train_length_of(options["train_length"], net.config, model)
    tokenizer = saved_tokenizer(model)
    ids = rows_of_text(Path(text), tokenizer, options["length"], options["rows"])
    runs = [None] if policy is None else [None, policy]
    with _bar(console(stderr=True), ids.shape[1] * len(prompts) * len(runs)) as progress:
        found = [
            _diagnose(net, ids, train_length, tokenizer, prompts, run, called(model), progress)
            for run in runs
        ]
    record = as_record(found, {"text": text, "rows": options["rows"]})
    if report is not None:
        from statewright.report.diagnosis import page

        Path(report).write_text(page(record), encoding="utf-8")
    if options["as_json"]:
        emit(record)
        return
    for diagnosis in found:
        draw(console(), diagnosis)
    _advise(model, text, found[-1], report)


def load_model(model: str) -> Any:
    """Ours, converted to ours, or a host; what could not be converted is said in one line."""
    from statewright.models.any_model import load_probed

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        net = load_probed(model)
    for note in notes:
        click.echo(str(note.message), err=True)
    return net


def _diagnose(
    net: Any,
    ids: Any,
    train_length: int,
    tokenizer: Any,
    prompts: Sequence[str],
    policy: str | None,
    name: str,
    progress: Any,
) -> Any:
    from statewright.diagnosis import diagnose as run

    return run(net, ids, train_length, tokenizer, prompts, policy, name, progress)


def as_record(found: Sequence[Any], about: dict[str, Any]) -> dict[str, Any]:
    """What --json prints and the page is made of."""
    import torch
    import transformers

    from statewright import __version__

    versions = {
        "statewright": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"format": 1, "versions": versions, **about, "runs": [d.as_dict() for d in found]}


@contextmanager
def _bar(console: Any, total: int) -> Iterator[Any]:
    """Yields `progress(prompt, tokens)` for a bar over all tokens of all prompts."""
    from statewright.cli.progress import reading_bar

    seen: dict[str, int] = {}
    with reading_bar(console, total) as advance:

        def progress(prompt: str, tokens: int) -> None:
            seen[prompt] = seen.get(prompt, 0) + tokens
            advance(tokens, sum(seen.values()))

        yield progress


def draw(console: Any, diagnosis: Any) -> None:
    """The verdict in words, the loss by position and the table of the prompts."""
    from rich.text import Text

    reading, verdict = diagnosis.text.reading, diagnosis.verdict
    under = "" if reading.policy == "none" else f", under {reading.policy}"
    said = Text(verdict.name, style=_STYLES[verdict.name.split()[0]])
    console.print(said.append(f"  {diagnosis.model}{under}", style="default"), soft_wrap=True)
    console.print(diagnosis.text.words)
    fresh = {c.begin: f"{c.fresh:.2f}" for c in reading.comparisons}
    rows = [(f"{bucket.end:,}", "", f"{bucket.nats:.2f}") for bucket in reading.inside]
    rows += [
        (f"{bucket.end:,}", f"{bucket.nats:.2f}", fresh.get(bucket.begin, ""))
        for bucket in reading.buckets[1:]
    ]
    columns = [Column(n, number=True) for n in ("tokens", "read on", "from an empty state")]
    table(console, "loss by position, nats per token", columns, rows)
    _prompts(console, diagnosis)


def _prompts(console: Any, diagnosis: Any) -> None:
    from statewright.diagnosis.verdict import unforgetting

    names = ("in window", "worst", "safe up to", "heads that do not forget")
    columns = ["prompt", *(Column(name, number=True) for name in names), "verdict"]
    rows = []
    for examined in (diagnosis.text, *diagnosis.others):
        reading, verdict = examined.reading, examined.verdict
        heads = sum(len(layer.growth) for layer in reading.layers)
        rows.append(
            (
                examined.prompt,
                f"{reading.in_window:.2f}",
                f"{verdict.worst:.2f}x",
                f"{verdict.safe_length:,}" if verdict.cause else "all",
                f"{len(unforgetting(reading))} of {heads}",
                verdict.name,
            )
        )
    table(console, "prompts", columns, rows)


def _advise(model: str, text: str, diagnosis: Any, report: str | None) -> None:
    if diagnosis.verdict.name.startswith("collapse"):
        click.echo(f"next: statewright repair {called(model)} --text {text} --output-dir fixed/")
    if report is not None:
        click.echo(f"report: {report}")
