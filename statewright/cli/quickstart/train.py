"""Quickstart's steps on a minGRU: trained by scan, then read on with in constant memory."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import human_bytes
from statewright.cli.quickstart.screen import Screen

_MOST_STEPS = 2000


def make_run(text: str, directory: Path, seed: int) -> Any:
    """A byte minGRU of 3 x 192, to be trained on the first three quarters of the text."""
    import torch

    from statewright.models import StatewrightConfig, StatewrightForCausalLM
    from statewright.models.tokenizers import byte_tokenizer
    from statewright.train.config import TrainConfig
    from statewright.train.data import corpus_of
    from statewright.train.loop import Run

    tokenizer = byte_tokenizer()
    train, rest = corpus_of([[text]], tokenizer).split(0.25)
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


def train(screen: Screen, run: Any, seconds: float) -> dict[str, Any]:
    """As many steps as fit the time; beside them, what one step costs as a loop over tokens."""
    from statewright.cli.progress import TrainingBar
    from statewright.train.loop import TrainingInterrupted, TrainingStopped

    scan, loop = _per_step(run)
    steps = max(20, min(_MOST_STEPS, int(seconds * 0.9 / scan)))
    run.config = replace(run.config, num_steps=steps, eval_every=steps, save_every=steps)
    try:
        with TrainingBar(screen.console, steps) as bar:
            run.listen = bar
            run.train()
    except TrainingInterrupted as stop:
        raise click.Abort from stop
    except TrainingStopped as stop:
        raise ValueError(str(stop)) from stop
    found = {
        "steps": steps,
        "bits_per_byte": run.valid.bits_per_byte,
        "seconds": run.seconds,
        "loop_seconds": loop * steps,
    }
    screen.say(
        f"{steps} steps by scan: [bold]{run.seconds:.0f} s[/bold]; the same steps token by token: "
        f"[bold]{found['loop_seconds']:,.0f} s[/bold] (one was timed: {loop / scan:.0f} times)"
    )
    screen.say(
        f"held-out: [bold]{found['bits_per_byte']:.2f}[/bold] bits per byte (8 before training)"
    )
    return found


def _per_step(run: Any) -> tuple[float, float]:
    """Seconds of forward and backward on a copy, all tokens at once and one after the other."""
    model, batch = copy.deepcopy(run.model), run.lanes.batch(0)

    def scan() -> Any:
        return model(batch.ids, reset=batch.reset).logits.float().logsumexp(-1).mean()

    def loop() -> Any:
        state, total = None, 0.0
        for t in range(batch.ids.shape[1]):
            now = slice(t, t + 1)
            out = model(batch.ids[:, now], state=state, reset=batch.reset[:, now])
            state, total = out.state, total + out.logits.float().logsumexp(-1).mean()
        return total

    def timed(make: Any, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            make().backward()
        return (time.perf_counter() - began) / times

    timed(scan, 1)
    return timed(scan, 3), timed(loop, 1)


def write(screen: Screen, session: Any, tokenizer: Any) -> None:
    """What the model writes after "The "."""
    from statewright.token_text import text_of

    prompt = "The "
    session.feed(tokenizer(prompt)["input_ids"])
    screen.quote(prompt + text_of(tokenizer, session.generate(180, temperature=0.7, top_k=20)[0]))


def read_on(screen: Screen, session: Any, run: Any) -> dict[str, Any]:
    """Read what was held out, and say what it took beside a Transformer of the same width."""
    import torch

    from statewright.cli.size import measure

    rest = torch.from_numpy(run.valid_corpus.tokens.astype("int64"))
    before, began = session.nbytes, time.perf_counter()
    session.feed(rest)
    speed = len(rest) / (time.perf_counter() - began)
    cache = measure(run.model, len(rest), 1)["transformer_bytes"]
    screen.table(
        ["memory", "before", f"after {len(rest):,} tokens"],
        [
            ["this model's state", human_bytes(before), human_bytes(session.nbytes)],
            ["a Transformer's cache, same width", "0 B", human_bytes(cache)],
        ],
    )
    return {"tokens": len(rest), "bytes": session.nbytes, "cache": cache, "per_second": speed}


def go_back(screen: Screen, session: Any, directory: Path) -> dict[str, bool]:
    """Four ways to the same point must write the same tokens; anything else is our bug."""
    import torch

    from statewright.session import Session

    point = session.seen
    session.save(directory / "reader.state")
    fork = session.fork()
    first = session.generate(48)
    ways = {
        "a fork made before writing": fork,
        "the writer, rewound": session.rewind(to=point),
        "a session loaded from reader.state": Session.load(
            directory / "reader.state", session.model
        ),
    }
    same = {way: torch.equal(first, other.generate(48)) for way, other in ways.items()}
    words = {True: "identical", False: "DIFFERENT: please report this"}
    screen.table(["48 tokens written by", ""], [[way, words[ok]] for way, ok in same.items()])
    return same
