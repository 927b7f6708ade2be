"""`statewright generate`: read a prompt of any length in constant memory, then write."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import COUNT

# Tokens after which a character that does not end is taken for garbage.
_MAX_HELD = 64


@click.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(), help="A text file of any length, read first.")
@click.option("--load-state", type=click.Path(), help="Continue from a state file.")
@click.option("--save-state", type=click.Path(), help="Write the state at the end.")
@click.option("--max-new-tokens", type=COUNT, default=200, show_default=True, help="0: only read.")
@click.option("--temperature", default=0.8, show_default=True, help="0: greedy.")
@click.option("--top-k", type=COUNT, help="Sample among the k likeliest tokens.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens of this mass.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--chunk",
    type=COUNT,
    default=1024,
    show_default=True,
    help="Tokens per call while reading; the split points of a state file.",
)
def generate(model: str, prompt: str | None, prompt_file: str | None, **options: Any) -> None:
    """Continue a prompt with MODEL, a directory that `train` wrote.

    The prompt is streamed through the state, so a whole library costs no more memory than a
    line. What is written goes to stdout, all else to stderr.
    """
    from rich.console import Console

    from statewright.cli.common import quiet_libraries
    from statewright.models import load
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.session import Session

    quiet_libraries()
    console = Console(stderr=True)
    net = load(model)
    tokenizer = saved_tokenizer(model)
    chunk = options["chunk"]
    if options["load_state"]:
        session = Session.load(options["load_state"], net, chunk=chunk, snapshot_bytes=0)
        console.print(f"continuing after {session.seen:,} tokens from {options['load_state']}")
    else:
        session = Session(net, chunk=chunk, snapshot_bytes=0)
    _read_all(session, tokenizer, prompt, prompt_file, console)
    if options["max_new_tokens"]:
        if session.logits is None:
            session.feed([_begin_id(tokenizer)])
        _write(session, tokenizer, prompt if prompt_file is None else None, options)
    if options["save_state"]:
        session.save(options["save_state"])
    console.print(
        f"{session.seen:,} tokens seen, state {session.nbytes:,} bytes"
        + (f", saved to {options['save_state']}" if options["save_state"] else "")
    )


def _read_all(
    session: Any, tokenizer: Any, prompt: str | None, prompt_file: str | None, console: Any
) -> None:
    from statewright.cli.progress import reading_bar
    from statewright.train.data import read_text

    if prompt_file is not None:
        total = Path(prompt_file).stat().st_size if Path(prompt_file).is_file() else None
        with reading_bar(console, total) as advance:
            feed_text(session, tokenizer, read_text(prompt_file), advance)
    if prompt:
        feed_text(session, tokenizer, [prompt])


def feed_text(session: Any, tokenizer: Any, pieces: Any, advance: Any = None) -> None:
    """Feed text piece by piece, in calls of exactly `session.chunk` tokens and one shorter one."""
    from statewright.train.data import encode

    held: list[int] = []
    for piece in pieces:
        for ids in encode([piece], tokenizer):
            held += ids
            whole = len(held) // session.chunk * session.chunk
            if whole:
                session.feed(held[:whole])
                held = held[whole:]
        if advance is not None:
            advance(len(piece.encode("utf-8")), session.seen)
    if held:
        session.feed(held)


def _write(session: Any, tokenizer: Any, prompt: str | None, options: dict[str, Any]) -> None:
    """Stream text to stdout; a token may be part of a character, so decode what is complete."""
    from statewright.train.data import encode

    if prompt:
        sys.stdout.write(prompt)
    context = next(encode([prompt], tokenizer))[-1:] if prompt else []
    names = ("temperature", "top_k", "top_p", "seed")
    stream = session.stream(
        options["max_new_tokens"],
        stop=tokenizer.eos_token_id,
        **{name: options[name] for name in names},
    )
    for text in decode_stream(tokenizer, (int(ids[0]) for ids in stream), context):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def decode_stream(tokenizer: Any, ids: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of ids as soon as it is certain, never half a character.

    Every piece is decoded behind the one before it (first: behind `context`), because many
    tokenizers drop the space before the first word that they decode.
    """
    before, held = list(context), []
    for token in ids:
        if token == tokenizer.eos_token_id:
            break
        held.append(token)
        text = tokenizer.decode(before + held)
        if not text.endswith("\ufffd") or len(held) >= _MAX_HELD:
            yield text[len(tokenizer.decode(before)) :]
            before, held = held, []
    if held:
        yield tokenizer.decode(before + held)[len(tokenizer.decode(before)) :]


def _begin_id(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("this tokenizer has no token to begin with; give a --prompt")
