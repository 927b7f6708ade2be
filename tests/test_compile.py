"""What compiles as one graph and what exports: `python tests/test_compile.py` writes the table."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import SPECS
from torch import nn

from statewright import laws
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.policies import build_policy

PAGE = Path(__file__).parents[1] / "docs/compile.md"
MODELS: dict[str, str | list[str]] = dict(SPECS)
MODELS["attention, window=5"] = "attention:num_heads=4:window=5"
MODELS["hybrid"] = ["mingru", "attention:num_heads=4", "lstm"]
SAMPLE = ["attention, window=5", "hybrid", "lstm", "s4"]


class Inputs:
    """Ids (2, 6), a state that has seen something, and every kind of flag."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 11, (2, 6), generator=generator)
        self.state = model.random_state(2, generator)
        self.mask = torch.ones(2, 6, dtype=torch.long)
        self.mask[0, :2] = 0
        self.reset = torch.zeros(2, 6, dtype=torch.bool)
        self.reset[1, 3] = True


def model_of(name: str) -> StatewrightForCausalLM:
    mixer = MODELS[name]
    layers = len(mixer) if isinstance(mixer, list) else 1
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=layers, mixer=mixer, use_cache=False
    )
    return StatewrightForCausalLM(config).double().eval()


def whole(model: nn.Module) -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def same(model: nn.Module, other: Callable, ids: torch.Tensor, **options) -> bool:
    got, want = other(ids, **options), model(ids, **options)
    seen = options.get("attention_mask", torch.ones_like(ids)).bool()
    worst = laws.error(got.logits[seen], want.logits[seen])
    return max(worst, laws.error(got.state, want.state)) < 1e-12


def forward(model: nn.Module, at: Inputs) -> bool:
    return same(model, whole(model), at.ids)


def flags(model: nn.Module, at: Inputs) -> bool:
    options = dict(state=at.state, attention_mask=at.mask, reset=at.reset)
    return same(model, whole(model), at.ids, **options)


def one_token(model: nn.Module, at: Inputs) -> bool:
    return same(model, whole(model), at.ids[:, :1], state=at.state)


def training(model: nn.Module, at: Inputs) -> bool:
    gradients = []
    for call in (whole(model), model):
        model.zero_grad()
        call(at.ids, labels=at.ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    # transformers takes the loss in float32.
    return all(laws.error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


def export(model: nn.Module, at: Inputs) -> bool:
    options = dict(state=at.state, attention_mask=at.mask)
    program = torch.export.export(model, (at.ids,), options, strict=False)
    return same(model, program.module(), at.ids, **options)


def repair(model: nn.Module, at: Inputs) -> bool:
    return same(model, whole(model), at.ids, policy=build_policy("forgetmore:decay=0.9"))


def normed(model: nn.Module, at: Inputs) -> bool:
    return same(model, whole(model), at.ids, policy=build_policy("statenorm:limit=0.2:every=1"))


def eviction(model: nn.Module, at: Inputs) -> bool:
    return same(model, whole(model), at.ids, policy=build_policy("tova:budget=4"))


COLUMNS: dict[str, Callable[[nn.Module, Inputs], bool]] = {
    "forward": forward,
    "mask, reset, state": flags,
    "one token": one_token,
    "training": training,
    "export": export,
    "forgetmore": repair,
    "statenorm": normed,
    "tova": eviction,
}


def answer(name: str, column: Callable) -> str:
    """yes, or no where torch refuses; a wrong result raises."""
    model = model_of(name)
    try:
        right = column(model, Inputs(model))
    except Exception:
        # Each of torch's refusals has a class of its own.
        return "no"
    assert right, f"{name}: {column.__name__} compiles, and differs"
    return "yes"


def row(name: str) -> str:
    return " | ".join([f"| {name}", *(answer(name, c) for c in COLUMNS.values())]) + " |"


def table() -> str:
    heads = f"| mixer | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|\n"
    return heads + "".join(f"{row(name)}\n" for name in MODELS)


@pytest.mark.parametrize("name", SAMPLE)
def test_with_flags_it_is_one_graph(name: str) -> None:
    model = model_of(name)
    assert flags(model, Inputs(model))


@pytest.mark.parametrize("name", ["hybrid", "lstm"])
def test_it_exports(name: str) -> None:
    model = model_of(name)
    assert export(model, Inputs(model))


def test_every_mixer_has_a_row() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "|" in line]
    assert rows[2:] == list(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_page_is_true(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert row(name) in PAGE.read_text()


if __name__ == "__main__":
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    warnings.simplefilter("ignore")
    before = PAGE.read_text()
    PAGE.write_text(before.partition("|")[0] + table())
