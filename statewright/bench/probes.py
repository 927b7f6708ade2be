"""What a diagnosis costs over reading the same text once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from statewright.bench.protocol import Case
from statewright.diagnosis import read
from statewright.diagnosis.runner import Runner, nats
from statewright.diagnosis.schedule import schedule_for
from statewright.diagnosis.stream import Stream
from statewright.models import StatewrightConfig, StatewrightForCausalLM

_TRAIN_LENGTH = 256
_MIXERS = ("mamba2:state_size=64:head_dim=32", "gla", "mamba", "mingru", "minlstm")


def cases(quick: bool) -> Iterator[Case]:
    """A 4-layer byte model of width 256 reads one text, plainly and with every probe."""
    for mixer in _MIXERS:
        yield reading(mixer, 2048 if quick else 16_384)


def reading(mixer: str, length: int) -> Case:
    """probed: states at every probe, gates where they are watched; diagnosed: and the windows that
    say what the same tokens cost from an empty state. The floor reads in calls of 1,024 tokens."""
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=256, num_hidden_layers=4, mixer=mixer)
    model = StatewrightForCausalLM(config).eval()
    ids = torch.randint(256, (1, length + 1))
    run, schedule = Runner(model), schedule_for(ids, _TRAIN_LENGTH, config.vocab_size)

    def plain() -> None:
        state = None
        for begin in range(0, length, schedule.largest):
            piece = ids[:, begin : begin + schedule.largest + 1]
            out = run(piece[:, :-1], state)
            state = out.state
            nats(out.logits, piece[:, 1:])

    def probed() -> None:
        stream = Stream(run, ids, schedule)
        for call in schedule.calls():
            stream.read(call)

    methods = {
        "floor: read once": _without_gradient(plain),
        "probed": _without_gradient(probed),
        "diagnosed": lambda: read(model, ids, _TRAIN_LENGTH),
    }
    name = mixer.partition(":")[0]
    return Case(f"probes of {name}, {length:,} tokens", "floor: read once", methods)


def _without_gradient(call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run
