"""`statewright generate`: read a prompt of any length in constant memory, then write."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from statewright.cli.show import console
from statewright.cli.types import COUNT, MODEL, POLICY, POSITIVE, SEED, TEXT, Number


def _text(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """What the system hands over undecoded, as lone surrogates, is no text."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("not UTF-8 text", ctx, parameter) from error
    return value


@click.command()
@click.argument("model", type=MODEL)
@click.option("--prompt", callback=_text, help="Text to continue.")
@click.option("--prompt-file", type=TEXT, help="A text file of any length, read first.")
@click.option(
    "--policy",
    type=POLICY,
    help="Bound the state, e.g. tova:budget=512 or window:budget=1MiB:sinks=4; none lifts the "
    "config's [default: the state file's, else the config's].",
)
@click.option("--load-state", type=TEXT, help="Continue from a state file.")
@click.option("--change-policy", is_flag=True, help="Let --policy replace the state file's.")
@click.option("--save-state", type=click.Path(), help="Write the state at the end.")
@click.option("--max-new-tokens", type=COUNT, default=200, show_default=True, help="0: only read.")
@click.option("--temperature", type=Number(0), default=0.8, show_default=True, help="0: greedy.")
@click.option("--top-k", type=POSITIVE, help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p",
    type=Number(0, 1, above=True),
    help="Sample among the likeliest tokens of this mass.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--chunk",
    type=POSITIVE,
    default=1024,
    show_default=True,
    help="Tokens per call while reading; the split points of a state file.",
)
def generate(model: str, prompt: str | None, prompt_file: str | None, **options: Any) -> None:
    """Continue a prompt with MODEL: a directory, an id, or a name such as smollm2-135m.

    \b
    Example: statewright generate run --prompt 'The '

    The prompt is streamed through the state, so with a recurrent model or under a policy a whole
    library costs no more memory than a line. What is written goes to stdout, all else to stderr.
    """
    from statewright.cli.common import quiet_libraries

    quiet_libraries()
    to = console(stderr=True, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the config bounds this model by default")
        warnings.showwarning = lambda message, *where: to.print(f"note: {message}")
        net, tokenizer = _load(model)
        session = _session(net, options, to)
        _read_all(session, tokenizer, prompt, prompt_file, to)
        if options["max_new_tokens"]:
            if session.logits is None:
                session.feed([_begin_id(tokenizer)])
            _write(session, tokenizer, prompt if prompt_file is None else None, options)
    if options["save_state"]:
        session.save(options["save_state"])
    to.print(
        f"{session.seen:,} tokens seen, state {session.nbytes:,} bytes"
        + (f", saved to {options['save_state']}" if options["save_state"] else "")
    )


def _load(path: str) -> tuple[Any, Any]:
    """The model, ours wherever we can read it and else as transformers runs it, and tokenizer."""
    from statewright.hf.loading import load_causal_lm
    from statewright.models import load
    from statewright.models.convert import FAMILIES
    from statewright.models.load import OURS, read_config
    from statewright.models.tokenizers import load_tokenizer, saved_tokenizer

    if not Path(path).is_dir():
        return load_causal_lm(path), load_tokenizer(path)
    raw = read_config(Path(path))
    # A damaged config of a family that we know is refused here; transformers would fill it up with
    # defaults of billions of weights.
    ours = raw.get("model_type") in (None, OURS, *FAMILIES)
    return (load if ours else load_causal_lm)(path), saved_tokenizer(path)


def _session(net: Any, options: dict[str, Any], console: Any) -> Any:
    from statewright.policies import policy_spec
    from statewright.session import Session

    given, common = options["policy"], {"chunk": options["chunk"], "snapshot_bytes": 0}
    if options["load_state"]:
        change = options["change_policy"]
        path = options["load_state"]
        session = Session.load(path, net, given, change_policy=change, **common)
        under = "" if session.policy is None else f", under {policy_spec(session.policy)}"
        console.print(f"continuing after {session.seen:,} tokens from {path}{under}")
        return session
    if options["change_policy"]:
        raise ValueError("--change-policy needs --load-state")
    session = Session(net, given, **common)
    if session.policy is not None:
        why = " (the config's default; --policy none lifts it)" if given is None else ""
        console.print(f"policy {policy_spec(session.policy)}{why}")
    return session


def _read_all(
    session: Any, tokenizer: Any, prompt: str | None, prompt_file: str | None, console: Any
) -> None:
    from statewright.cli.progress import reading_bar
    from statewright.text_file import read_text

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
    """Stream text to stdout, every character as soon as it is whole."""
    from statewright.token_text import text_stream

    if prompt:
        sys.stdout.write(prompt)
    context = _text_before(session.last_ids[0].tolist(), tokenizer)
    names = ("temperature", "top_k", "top_p", "seed")
    stream = session.stream(
        options["max_new_tokens"],
        stop=tokenizer.eos_token_id,
        **{name: options[name] for name in names},
    )
    for text in text_stream(tokenizer, (int(ids[0]) for ids in stream), context):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _text_before(ids: list[int], tokenizer: Any) -> list[int]:
    """The end of ids that is text: what follows a special token begins a text."""
    special = set(tokenizer.all_special_ids)
    last = max((i for i, token in enumerate(ids) if token in special), default=-1)
    return ids[last + 1 :]


def _begin_id(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("this tokenizer has no token to begin with; give a --prompt")
