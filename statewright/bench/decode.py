"""One token at a time, and a language model end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from statewright.bench import peers
from statewright.bench.protocol import Case
from statewright.mixers import MinGRU, build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM


def cases(quick: bool) -> Iterator[Case]:
    """Decoding one token per layer, and training steps of a language model."""
    yield step("mingru", 256)
    yield step("minlstm", 256)
    yield language_model(4 if quick else 16, 128 if quick else 512)


def step(kind: str, D: int) -> Case:
    """One token through a layer of width D; the difference to the projection is the overhead."""
    torch.manual_seed(0)
    mixer, x = build_mixer(kind, D).eval(), torch.randn(1, 1, D)
    state = mixer.init_state(1)

    def repeat(call: Callable) -> Callable:
        def run() -> None:
            with torch.no_grad():
                for _ in range(200):
                    call()

        return run

    methods = {
        "floor: projection": repeat(lambda: mixer.in_proj(x)),
        "ours": repeat(lambda: mixer(x, state)),
    }
    return Case(f"{kind} one token, width {D}, 200 calls", "floor: projection", methods)


def language_model(B: int, T: int) -> Case:
    """Forward, loss and backward of a 4-layer minGRU LM; the peer's layers in the same model."""
    torch.manual_seed(0)
    config = StatewrightConfig(vocab_size=256, hidden_size=256, num_hidden_layers=4, mixer="mingru")
    ids = torch.randint(256, (B, T))

    def training(model: nn.Module) -> Callable:
        def run() -> None:
            logits = model(ids).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)

        return run

    methods = {"floor: ours": training(StatewrightForCausalLM(config))}
    if peers.minimal_layer("mingru", 8) is not None:
        other = StatewrightForCausalLM(config)
        for block in other.model.layers:
            block.mixer = _Peer(config.hidden_size)
        methods["mingru-pytorch layers"] = training(other)
    return Case(f"minGRU LM training step {B}x{T}", "floor: ours", methods)


class _Peer(MinGRU):
    """The peer's layer where our mixer stood."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.layer = peers.minimal_layer("mingru", hidden_size)

    def forward(self, x, state=None, mask=None, reset=None, policy=None):
        return self.layer(x), state
