"""`statewright repair`: make a recurrent model read on, without training or with a little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from statewright.cli.types import COUNT, MODEL, POSITIVE, TEXT, Names, Number

_DEFAULT_LENGTHS = 128
# Rows stand in the first so many times the tokens that they read; the rest is not tokenised.
_SPREAD = 8


@click.command()
@click.argument("model", type=MODEL)
@click.option("--text", required=True, type=TEXT, help="To search on (and train on).")
@click.option("--report-text", type=TEXT, help="To report on [default: end of --text].")
@click.option("--output-dir", required=True, type=click.Path(), help="Where the result goes.")
@click.option("--length", type=COUNT, help="Tokens per row [default: 128 training lengths].")
@click.option(
    "--rows", type=POSITIVE, default=4, show_default=True, help="Places read side by side."
)
@click.option("--train-length", type=COUNT, help="Tokens of one training text, if not recorded.")
@click.option(
    "--only",
    type=Names("statewright.diagnosis.repair:KINDS", "policy", several=True),
    help="forgetmore,statenorm,statewindow,deltascale: some of them.",
)
@click.option("--train", "num_steps", type=COUNT, help="Instead: so many steps of state passing.")
@click.option(
    "--learning-rate",
    type=Number(0, above=True),
    default=2e-3,
    show_default=True,
    help="With --train.",
)
@click.option("--report", type=click.Path(), help="Write one page, before and after.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def repair(model: str, text: str, output_dir: str, **options: Any) -> None:
    """Search policies under which MODEL reads beyond its training length; save the best with it.

    Chosen is the smallest loss beyond the training length whose loss inside it is within 2 %; it
    becomes the saved model's default policy. With --train, the weights are trained instead, states
    passed on from segment to segment.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.diagnosis.train_length import train_length_of
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    directory = Path(output_dir)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: not empty; choose another --output-dir")
    net, tokenizer = load(model, "float32"), saved_tokenizer(model)
    train_length = train_length_of(options["train_length"], net.config, model)
    length = options["length"] or _DEFAULT_LENGTHS * train_length
    search, report = _texts(text, options["report_text"], tokenizer, length, options["rows"])
    if options["num_steps"]:
        found = _train(net, tokenizer, text, directory, train_length, report, options)
    else:
        found = _search(net, search, report, train_length, options["only"])
        _save(net, Path(model), directory, found.policy)
    if options["report"] is not None:
        _page(model, directory, report, train_length, tokenizer, options["report"], text)
    if options["as_json"]:
        click.echo(json.dumps(found.as_dict(), indent=1))
        return
    _show(found, directory)


def _texts(text: str, other: str | None, tokenizer: Any, length: int, rows: int) -> Any:
    """(rows, length + 1) to search on and to report on: halves of one text, or two texts."""
    from statewright.diagnosis.diagnosis import rows_of
    from statewright.diagnosis.prompts import text_ids

    most = _SPREAD * rows * (length + 1)
    tokens = text_ids(text, tokenizer, most)
    if other is None:
        half = len(tokens) // 2
        parts = [tokens[:half], tokens[half:]]
    else:
        parts = [tokens, text_ids(other, tokenizer, most)]
    lengths = [min(length + 1, len(part) // rows) for part in parts]
    return [rows_of(part, size, rows) for part, size in zip(parts, lengths)]


def _search(net: Any, search: Any, report: Any, train_length: int, only: str | None) -> Any:
    from rich.console import Console

    from statewright.diagnosis.repair import KINDS, repair

    kinds = KINDS if only is None else tuple(k.strip() for k in only.split(",") if k.strip())
    console = Console(stderr=True)

    def listen(trial: Any) -> None:
        line = f"{trial.policy:<44} inside {trial.inside:.3f}  beyond {trial.beyond:.3f}"
        console.print(line, highlight=False, markup=False)

    return repair(net, search, report, train_length, kinds, listen)


def _train(
    net: Any,
    tokenizer: Any,
    text: str,
    directory: Path,
    train_length: int,
    report: Any,
    options: dict[str, Any],
) -> Any:
    """State passing on the text (its second half is left out if it is reported on)."""
    from rich.console import Console

    from statewright.cli.progress import TrainingBar
    from statewright.diagnosis.passing import pass_states, passing_config
    from statewright.diagnosis.repair import Repair, try_policy
    from statewright.text_file import read_text
    from statewright.train.data import corpus_of

    corpus = corpus_of([read_text(text)], tokenizer)
    if options["report_text"] is None:
        corpus = corpus.split(0.5)[0]
    before = try_policy(net, report, train_length, "none")
    config = passing_config(train_length, options["num_steps"], options["learning_rate"])
    with TrainingBar(Console(stderr=True), config.num_steps, 0) as bar:
        pass_states(net, tokenizer, corpus, config, directory, bar)
    after = try_policy(net, report, train_length, "none")
    return Repair(f"train:{config.num_steps}", train_length, (), before, after)


def _save(net: Any, source: Path, directory: Path, policy: str) -> None:
    from statewright.models.load import copy_tokenizer
    from statewright.train.checkpoint import replace_directory

    net.config.policy = None if policy == "none" else policy

    def write(at: Path) -> None:
        net.save_pretrained(at)
        copy_tokenizer(source, at)

    replace_directory(directory, write)


def _page(
    model: str,
    directory: Path,
    ids: Any,
    train_length: int,
    tokenizer: Any,
    path: str,
    text: str,
) -> None:
    """Loss and states of the model as it was and as it is, side by side."""
    import warnings

    from statewright.cli.diagnose import as_record
    from statewright.diagnosis import diagnose
    from statewright.models import load
    from statewright.report.diagnosis import page

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what the policy is, the page says itself
        fixed = load(directory, "float32")
    found = [
        diagnose(load(model, "float32"), ids, train_length, tokenizer, policy="none", name=model),
        diagnose(fixed, ids, train_length, tokenizer, name=str(directory)),
    ]
    record = as_record(found, {"text": Path(text).name, "rows": len(ids)})
    Path(path).write_text(page(record), encoding="utf-8")


def _show(found: Any, directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="nats per token, on text that was not searched on", title_justify="left")
    for column in ("tokens", "before", "after"):
        table.add_column(column, justify="right")
    inside = f"{found.train_length:,}"
    table.add_row(inside, f"{found.before.inside:.3f}", f"{found.after.inside:.3f}")
    for (tokens, before), (_, after) in zip(found.before.octaves, found.after.octaves):
        table.add_row(f"{tokens:,}", f"{before:.3f}", f"{after:.3f}")
    console.print(table)
    if found.policy == "none":
        console.print(f"nothing helped within 2 % of the loss inside; {directory} is a plain copy")
    else:
        console.print(f"{found.policy} -> {directory}", markup=False)
