"""`statewright quickstart`: the whole story on real text, on one screen."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import human_bytes
from statewright.cli.types import SEED, TEXT, Number

_OURS = ".quickstart"
# A Transformer that people know, a page of text for it, and a budget that the page outgrows.
_TRANSFORMER, _PAGE, _POLICY = "smollm2-135m", 320, "tova:budget=64"


@click.command()
@click.option("--text", type=TEXT, help="Any text file [default: Python's own manual].")
@click.option("--output-dir", type=click.Path(), default="runs/quickstart", show_default=True)
@click.option(
    "--seconds",
    type=Number(0, above=True),
    default=60.0,
    show_default=True,
    help="About this long.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
def quickstart(text: str | None, output_dir: str, seconds: float, seed: int) -> None:
    """Train a small recurrent LM on real text, write, read on in constant memory, go back.

    Then bound a pretrained Transformer (see `statewright models`), diagnose and repair a model that
    does not forget, and expand a state. Needs no download: the text is CPython's own manual.
    """
    import torch
    from rich.console import Console

    from statewright.cli.collapse_step import collapse, cure
    from statewright.cli.common import quiet_libraries
    from statewright.cli.expand_step import expand
    from statewright.session import Session

    quiet_libraries()
    directory = Path(output_dir)
    name, whole = (text, _read(text)) if text else ("Python's manual", _manual())
    run = _make_run(whole, directory, seed)
    _empty_own(directory)
    console = Console(highlight=False)
    console.rule("[bold]statewright quickstart", align="left")
    _step(
        console,
        1,
        "train",
        f"minGRU, {run.model.num_parameters():,} parameters, on the first "
        f"{human_bytes(run.train_corpus.num_bytes)} of {name}",
    )
    _train(run, console, seconds)
    session = Session(run.model, chunk=512)
    _step(console, 2, "write", "in its own words")
    _write(console, session, run.tokenizer, whole)
    rest = torch.from_numpy(run.valid_corpus.tokens.astype("int64"))
    _step(console, 3, "read", f"the rest, {len(rest):,} tokens, in constant memory")
    reader = Session(run.model, chunk=512)
    _read_on(console, reader, rest, run)
    _step(console, 4, "go back", "fork, rewind, load: the continuation must be identical")
    _go_back(console, reader, directory)
    _step(console, 5, "bound", f"a pretrained Transformer, {_TRANSFORMER}, under {_POLICY}")
    _bound(console, whole)
    _step(console, 6, "diagnose", "a Mamba-2 that never learned to forget, and repair it")
    sick = collapse(console, run.train_corpus, run.valid_corpus, directory)
    cure(console, sick, run.valid_corpus)
    _step(console, 7, "expand", "the reader's state to four times its size, and train on")
    expand(console, run, seconds / 2)
    console.rule(align="left")
    console.print(
        f"the model is in [bold]{directory}[/bold]; next:\n"
        f"  statewright generate {directory} --prompt 'The '\n"
        f"  statewright size {directory}\n"
        f"  statewright train --text YOUR.txt --output-dir runs/mine"
    )


def _manual() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _read(path: str) -> str:
    from statewright.text_file import whole_text

    return whole_text(path)


def _empty_own(directory: Path) -> None:
    """Empty the directory of an earlier quickstart; never touch anybody else's."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / _OURS).exists():
            raise ValueError(f"{directory}: not empty, and not from an earlier quickstart")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _OURS).touch()


def _make_run(whole: str, directory: Path, seed: int) -> Any:
    import torch

    from statewright.models import StatewrightConfig, StatewrightForCausalLM
    from statewright.models.tokenizers import byte_tokenizer
    from statewright.train.config import TrainConfig
    from statewright.train.data import corpus_of
    from statewright.train.loop import Run

    tokenizer = byte_tokenizer()
    train, rest = corpus_of([[whole]], tokenizer).split(0.25)
    config = TrainConfig(
        num_steps=100, num_lanes=8, length=128, learning_rate=4e-3, num_warmup_steps=20, seed=seed
    )
    model_config = StatewrightConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=3,
        mixer="mingru",
        mlp_ratio=2.0,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StatewrightForCausalLM(model_config)
    return Run(model, tokenizer, train, rest, config, directory)


def _train(run: Any, console: Any, seconds: float) -> None:
    """As many steps as fit the time, by the speed of the first ones on a copy."""
    import copy
    from dataclasses import replace

    from statewright.cli.progress import TrainingBar
    from statewright.train.config import TrainConfig
    from statewright.train.loop import TrainingInterrupted, TrainingStopped

    trial = copy.deepcopy(run.model)
    batch = run.lanes.batch(0)
    for i in range(4):
        if i == 1:
            began = time.perf_counter()
        trial(batch.ids, reset=batch.reset).logits.float().logsumexp(-1).mean().backward()
    per_step = (time.perf_counter() - began) / 3 * 1.2
    steps = max(20, min(2000, int(seconds * 0.8 / per_step)))
    config: TrainConfig = replace(run.config, num_steps=steps, eval_every=steps, save_every=steps)
    run.config = config
    try:
        with TrainingBar(console, steps) as bar:
            run.listen = bar
            run.train()
    except TrainingInterrupted as stop:
        raise click.Abort from stop
    except TrainingStopped as stop:
        raise ValueError(str(stop)) from stop
    uniform = 8.0
    console.print(
        f"   held-out: [bold]{run.valid.bits_per_byte:.2f}[/bold] bits per byte "
        f"({uniform:.0f} before training), {steps} steps, {run.seconds:.0f} s"
    )


def _write(console: Any, session: Any, tokenizer: Any, whole: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from statewright.token_text import text_of

    prompt = "The "
    session.feed(tokenizer(prompt)["input_ids"])
    ids = session.generate(180, temperature=0.7, top_k=20)[0].tolist()
    sample = " ".join((prompt + text_of(tokenizer, ids)).split())
    console.print(Padding(Text(sample, style="italic cyan"), (0, 3)))


def _read_on(console: Any, session: Any, rest: Any, run: Any) -> None:
    from statewright.cli.size import measure

    before = session.nbytes
    began = time.perf_counter()
    session.feed(rest)
    speed = len(rest) / (time.perf_counter() - began)
    report = measure(run.model, len(rest), 1)
    ratio = report["transformer_bytes"] / session.nbytes
    console.print(
        f"   state after 0 tokens      {before:>12,} bytes\n"
        f"   state after {session.seen:<9,}     {session.nbytes:>12,} bytes   "
        f"{speed:,.0f} tokens/s\n"
        f"   a Transformer's cache     {report['transformer_bytes']:>12,} bytes   "
        f"{ratio:,.0f}x, same width"
    )


def _go_back(console: Any, session: Any, directory: Path) -> None:
    """Four ways to the same point must write the same tokens; anything else is our bug."""
    import torch

    from statewright.session import Session

    point = session.seen
    session.save(directory / "reader.state")
    fork = session.fork()
    first = session.generate(48)
    loaded = Session.load(directory / "reader.state", session.model)
    for label, other in (
        ("a fork made before writing", fork),
        ("the writer, rewound", session.rewind(to=point)),
        ("a session loaded from reader.state", loaded),
    ):
        same = torch.equal(first, other.generate(48))
        mark = "[green]identical[/green]" if same else "[red]DIFFERENT: please report this[/red]"
        console.print(f"   {label:<36} {mark}")


def _bound(console: Any, whole: str) -> None:
    """The same page read without and under a policy, and how each goes on."""
    from rich.padding import Padding
    from rich.text import Text

    from statewright.hf.pretrained import locate
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.session import Session
    from statewright.token_text import text_of

    try:
        path = Path(locate(_TRANSFORMER))
    except ValueError as error:
        console.print(f"   skipped: {error}", markup=False, soft_wrap=True)
        return
    model, tokenizer = load(path, "float32"), saved_tokenizer(path)
    page = tokenizer(whole[: 8 * _PAGE])["input_ids"][:_PAGE]
    for label, policy in (("without a policy", "none"), (f"under {_POLICY}", _POLICY)):
        session = Session(model, policy, snapshot_bytes=0)
        session.feed(page)
        read = session.nbytes
        ids = session.generate(16, temperature=0)[0].tolist()
        console.print(
            f"   {label:<24} {read:>12,} bytes after {len(page):,} tokens, "
            f"{session.nbytes:,} after {session.seen:,}",
            soft_wrap=True,
        )
        sample = " ".join(text_of(tokenizer, ids).split())
        console.print(Padding(Text(sample, style="italic cyan"), (0, 6)))


def _step(console: Any, number: int, verb: str, rest: str) -> None:
    console.print(f"[bold]{number} {verb}[/bold]  {rest}", soft_wrap=False)
