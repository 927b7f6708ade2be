"""Every check of `statewright check` finds the bug that it is for, and only a bug."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_bridge import model_of
from test_train import one_thread  # noqa: F401
from torch import nn

from statewright import ops
from statewright.checks import checks, report
from statewright.checks.checks import CHECKS
from statewright.checks.report import OK, WRONG, check
from statewright.hf import bridge, host
from statewright.models import StatewrightConfig, StatewrightForCausalLM


class Around(nn.Module):
    """A sound Llama with one bug around it; `T` tokens come in, after a cache or not."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model_of("llama") if model is None else model
        self.config = self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=True,
    ):
        given = input_ids if inputs_embeds is None else inputs_embeds
        call = dict(locals())
        for name in ("self", "given", "__class__"):
            call.pop(name, None)
        return self.call(given.shape[1], call)

    def call(self, T: int, call: dict[str, Any]) -> Any:
        return self.model(**call)


class StepsDiffer(Around):
    """Decoding computes something else than reading."""

    def call(self, T, call):
        out = super().call(T, call)
        out.logits = out.logits * (1.02 if T == 1 and call["past_key_values"] is not None else 1)
        return out


class Restarts(Around):
    """Several tokens do not see the cache, as transformers' Mamba."""

    def call(self, T, call):
        if call["past_key_values"] is None or T == 1:
            return super().call(T, call)
        cache, call["past_key_values"] = call["past_key_values"], None
        logits = super().call(T, dict(call)).logits
        out = super().call(T, {**call, "past_key_values": cache})
        out.logits = logits
        return out


class ShortPieces(Around):
    """Pieces of two tokens (shorter than a convolution) go wrong."""

    def call(self, T, call):
        out = super().call(T, call)
        out.logits = out.logits.roll(1, -1) if T == 2 else out.logits
        return out


class CountsFromZero(Around):
    """Positions start at 0 in every call unless they are given, as Bamba's."""

    def call(self, T, call):
        if call["position_ids"] is None:
            call["position_ids"] = torch.arange(T)[None]
        return super().call(T, call)


class IgnoresLeftPadding(Around):
    def call(self, T, call):
        mask = call["attention_mask"]
        if mask is not None and not mask[:, 0].all():
            call["attention_mask"] = None
        return super().call(T, call)


class IgnoresRightPadding(Around):
    def call(self, T, call):
        mask = call["attention_mask"]
        if mask is not None and mask[:, 0].all() and call["past_key_values"] is not None:
            call["attention_mask"] = None
        return super().call(T, call)


class IgnoresDocuments(Around):
    def call(self, T, call):
        places = call["position_ids"]
        if places is not None and bool((places.diff(dim=1) < 0).any()):
            call["position_ids"] = torch.arange(T)[None]
        return super().call(T, call)


class Detaches(Around):
    def call(self, T, call):
        for layer in () if call["past_key_values"] is None else call["past_key_values"].layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return super().call(T, call)


class KeepsOrder(Around):
    """The cache ignores `reorder_cache`, as MiniMax's linear layers do."""

    def call(self, T, call):
        out = super().call(T, call)
        out.past_key_values.reorder_cache = lambda rows: None
        return out


class MixesRows(Around):
    def call(self, T, call):
        out = super().call(T, call)
        out.logits = out.logits + (out.logits.mean(0) if out.logits.shape[0] > 1 else 0) * 0.1
        return out


class CoarseState(Around):
    """In bfloat16 the carried keys lose most of their bits."""

    def call(self, T, call):
        cache = call["past_key_values"]
        if cache is not None and cache.layers[0].keys.dtype == torch.bfloat16:
            for layer in cache.layers:
                layer.keys = layer.keys.to(torch.float8_e5m2).to(torch.bfloat16) * 1.5
        return super().call(T, call)


class Shared(Around):
    """A cache that a user may continue twice: a copy is made of what comes in."""

    def call(self, T, call):
        call["past_key_values"] = copy.deepcopy(call["past_key_values"])
        return super().call(T, call)


def own(mixer: str = "mingru") -> nn.Module:
    torch.manual_seed(0)
    config = StatewrightConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, mixer=mixer)
    return StatewrightForCausalLM(config).eval()


def write_without_copies(monkeypatch) -> nn.Module:
    monkeypatch.setattr(bridge, "_copy", lambda tensor: tensor)
    return model_of("mamba2")


def save_in_bfloat16(monkeypatch) -> nn.Module:
    save = checks.save_state
    monkeypatch.setattr(
        checks, "save_state", lambda s, p: save(s.to(torch.bfloat16).to(torch.float32), p)
    )
    return model_of("llama")


def positions_off_by_one(monkeypatch) -> nn.Module:
    call = host.RawModel.__call__

    def shifted(self, ids, cache=None, start=0, *args, **kwargs):
        moved = start + 1 if isinstance(start, torch.Tensor) and cache is not None else start
        return call(self, ids, cache, moved, *args, **kwargs)

    monkeypatch.setattr(host.RawModel, "__call__", shifted)
    return model_of("llama")


def fast_but_wrong(monkeypatch) -> nn.Module:
    for name, scan in list(ops.MATRIX_BACKENDS.items()):

        def wrong(*args, scan=scan, **kwargs):
            o, end = scan(*args, **kwargs)
            return o + o.flip(-1), end

        if name != "ref":
            monkeypatch.setitem(ops.MATRIX_BACKENDS, name, wrong)
    return own("gla")


def around(kind: type) -> Callable:
    return lambda monkeypatch: kind()


PLANTED: list[tuple[str, Callable, Callable[[], nn.Module]]] = [
    ("fold", around(StepsDiffer), Around),
    ("chunk", around(Restarts), Around),
    ("chunks", around(Restarts), Around),
    ("chunks", around(ShortPieces), Around),
    ("positions", around(CountsFromZero), Around),
    ("left", around(IgnoresLeftPadding), Around),
    ("right", around(IgnoresRightPadding), Around),
    ("packed", around(IgnoresDocuments), Around),
    ("fork", write_without_copies, lambda: model_of("mamba2")),
    ("shared", around(Around), Shared),
    ("gradient", around(Detaches), Around),
    ("gradient", around(Restarts), Around),
    ("save", save_in_bfloat16, Around),
    ("beams", around(KeepsOrder), Around),
    ("batch", around(MixesRows), Around),
    ("bf16", around(CoarseState), Around),
    ("session", positions_off_by_one, Around),
    ("kernel", fast_but_wrong, lambda: own("gla")),
]


def planted_name(value: Any) -> str | None:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("name", "broken", "sound"), PLANTED, ids=planted_name)
def test_the_check_finds_it(name: str, broken: Callable, sound: Callable, monkeypatch) -> None:
    found = check(sound(), "sound", [name]).cells[name]
    assert found.verdict == OK, found
    found = check(broken(monkeypatch), "broken", [name]).cells[name]
    assert found.verdict == WRONG and found.error > report.LIMIT, found


def test_every_check_has_a_planted_bug() -> None:
    assert {name for name, *_ in PLANTED} == set(CHECKS)
