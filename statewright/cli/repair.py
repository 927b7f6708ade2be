"""`statewright repair`: make a recurrent model read on, without training or with a little."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import Column, console, json_option, show, table
from statewright.cli.types import COUNT, MODEL, POSITIVE, TEXT, Names, Number
from statewright.demos import called


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
@click.option("--save-unchanged", is_flag=True, help="Copy a model that nothing improves, too.")
@click.option("--report", type=click.Path(), help="Write one page, before and after.")
@json_option
def repair(model: str, text: str, output_dir: str, **options: Any) -> None:
    """Search policies under which MODEL reads beyond its training length; save the best with it.

    \b
    Example: statewright repair run --text book.txt --output-dir fixed

    A policy counts if its loss beyond the training length is lower by more than 2 %, beyond doubt
    (95 %, paired), on text that was not searched on too, and within 2 % inside it.
    Policies that tie with the best: the mildest. It becomes the saved model's default policy. With
    --train, the weights are trained instead, states passed on from segment to segment, and judged
    by the same rule. Where nothing counts, nothing is saved.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.diagnosis.prompts import two_texts
    from statewright.diagnosis.repair import LENGTHS
    from statewright.diagnosis.train_length import train_length_of
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    directory = Path(output_dir)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: not empty; choose another --output-dir")
    net, tokenizer = load(model, "float32"), saved_tokenizer(model)
    train_length = train_length_of(options["train_length"], net.config, model)
    length = options["length"] or LENGTHS * train_length
    other = options["report_text"] and Path(options["report_text"])
    search, report = two_texts(Path(text), other, tokenizer, length, options["rows"])
    if options["num_steps"]:
        found = _train(net, tokenizer, text, directory, train_length, report, options)
    else:
        found = _search(net, search, report, train_length, options["only"])
        if found.succeeded:
            _save(net, Path(model), directory, found.policy)
    if options["save_unchanged"] and not found.succeeded:
        _save(load(model, "float32"), Path(model), directory)
    saved = directory if found.succeeded or options["save_unchanged"] else None
    if options["report"] is not None:
        _page(model, saved, report, train_length, tokenizer, options["report"], text)
    record = {**found.as_dict(), "saved": saved}
    show(record, options["as_json"], lambda to, _: _draw(to, found, saved))


def _search(net: Any, search: Any, report: Any, train_length: int, only: str | None) -> Any:
    from statewright.diagnosis.repair import KINDS, repair

    kinds = KINDS if only is None else tuple(k.strip() for k in only.split(",") if k.strip())
    to = console(stderr=True)

    def listen(trial: Any) -> None:
        line = f"{trial.policy:<44} inside {trial.inside:.3f}  beyond {trial.beyond:.3f}"
        to.print(line, soft_wrap=True)

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
    from statewright.cli.progress import TrainingBar
    from statewright.diagnosis.passing import passing_config, repair_by_training
    from statewright.text_file import read_text
    from statewright.train.data import corpus_of
    from statewright.train.loop import TrainingInterrupted

    corpus = corpus_of([read_text(text)], tokenizer)
    if options["report_text"] is None:
        corpus = corpus.split(0.5)[0]
    config = passing_config(train_length, options["num_steps"], options["learning_rate"])
    # Only what succeeds gets the name that was asked for.
    beside = directory.with_name(f".{directory.name}.training")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with TrainingBar(console(stderr=True), config.num_steps, 0) as bar:
            found = repair_by_training(
                net, tokenizer, corpus, report, train_length, config, beside, bar
            )
        if found.succeeded:
            beside.replace(directory)
    except TrainingInterrupted as stop:
        raise click.exceptions.Exit(stop.exit_code) from stop
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return found


def _save(net: Any, source: Path, directory: Path, policy: str | None = None) -> None:
    """The model, with the policy as its default if one is given."""
    from statewright.models.load import copy_tokenizer
    from statewright.train.checkpoint import replace_directory

    if policy is not None:
        net.config.policy = policy

    def write(at: Path) -> None:
        net.save_pretrained(at)
        copy_tokenizer(source, at)

    replace_directory(directory, write)


def _page(
    model: str,
    directory: Path | None,
    ids: Any,
    train_length: int,
    tokenizer: Any,
    path: str,
    text: str,
) -> None:
    """Loss and states of the model as it was and, if it was saved, as it is, side by side."""
    import warnings

    from statewright.cli.diagnose import as_record
    from statewright.diagnosis import diagnose
    from statewright.models import load
    from statewright.report.diagnosis import page

    found = [
        diagnose(
            load(model, "float32"), ids, train_length, tokenizer, policy="none", name=called(model)
        )
    ]
    if directory is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what the policy is, the page says itself
            fixed = load(directory, "float32")
        found.append(diagnose(fixed, ids, train_length, tokenizer, name=str(directory)))
    record = as_record(found, {"text": text, "rows": len(ids)})
    Path(path).write_text(page(record), encoding="utf-8")


def _draw(console: Any, found: Any, saved: Path | None) -> None:
    inside = f"{found.train_length:,}"
    rows = [(inside, f"{found.before.inside:.3f}", f"{found.after.inside:.3f}")]
    for (tokens, before), (_, after) in zip(found.before.octaves, found.after.octaves):
        rows.append((f"{tokens:,}", f"{before:.3f}", f"{after:.3f}"))
    columns = [Column(name, number=True) for name in ("tokens", "before", "after")]
    table(console, "nats per token, on text that was not searched on", columns, rows)
    console.print(_told(found, saved), soft_wrap=True)


def _told(found: Any, saved: Path | None) -> str:
    """One line: what was found, and where it lies."""
    gain, where = found.gain, "nothing saved" if saved is None else f"{saved} is a plain copy"
    if found.succeeded:
        span = "" if gain.interval is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
        beyond = f"{gain.mean:+.3f}{span} nats per token beyond {found.train_length:,}"
        return f"{found.policy} -> {saved}: {beyond}"
    if found.healthy:
        return (
            f"healthy: what is carried beyond {found.train_length:,} tokens does no harm; {where}"
        )
    if found.policy == "none":
        return f"nothing helps: none gains 2 % beyond and costs less inside, on both texts; {where}"
    return f"{found.policy}: no gain of 2 % beyond, or more than that lost inside; {where}"
