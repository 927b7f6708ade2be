"""Survivors against an independent oracle: transformers' own attention weights, every policy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bounded_models import CONFIGS, tiny
from torch import Tensor
from transformers import DynamicCache

from statewright.hf.bounded import BoundedCache
from statewright.policies import build_policy

torch.set_num_threads(1)
LENGTH = 15
# Every model for the policies that look at attention; eight for those that do not.
MODELS_OF = {"tova": list(CONFIGS), "h2o": list(CONFIGS)}
EIGHT = ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "gpt2", "phi", "gpt_oss"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Layer:
    """What the oracle knows of one layer after a token: plain lists, one entry per slot."""

    def __init__(self) -> None:
        self.pos: Tensor = torch.zeros(0)
        self.mass: Tensor = torch.zeros(0)
        self.lag: list[dict[int, float]] = []
        self.history: list[tuple[Tensor, Tensor]] = []

    def add(self, weights: Tensor, keys: Tensor, values: Tensor, t: int) -> None:
        """weights (heads, n) of this query; keys, values (kv heads, n, Dh)."""
        H, n = keys.shape[:2]
        self.weights, self.keys, self.values = weights, keys, values
        old = self.pos if t else torch.zeros(H, 0, dtype=torch.long)
        self.pos = torch.cat([old, torch.full((H, 1), t)], 1)
        mass = self.mass if t else torch.zeros(H, 0, dtype=weights.dtype)
        mass = torch.cat([mass, torch.zeros(H, 1, dtype=weights.dtype)], 1)
        self.mass = mass + weights.view(H, -1, n).sum(1)
        self.history.append((keys[:, -1], values[:, -1]))


def tova(layer: Layer, t: int) -> Tensor:
    return layer.weights.mean(0).expand_as(layer.pos)


def tova_head(layer: Layer, t: int) -> Tensor:
    scores = layer.weights.view(len(layer.pos), -1, layer.pos.shape[1]).mean(1)
    return scores.masked_fill(layer.pos < 1, math.inf)


def h2o(layer: Layer, t: int) -> Tensor:
    return layer.mass.masked_fill(layer.pos > t - 3, math.inf)


def h2o_layer(layer: Layer, t: int) -> Tensor:
    return layer.mass.mean(0).expand_as(layer.pos).masked_fill(layer.pos > t - 3, math.inf)


def window(layer: Layer, t: int) -> Tensor:
    return layer.pos.double().masked_fill(layer.pos < 2, math.inf)


def key_norm(layer: Layer, t: int) -> Tensor:
    return -layer.keys.norm(dim=-1)


def key_diff(layer: Layer, t: int) -> Tensor:
    unit = layer.keys / layer.keys.norm(dim=-1, keepdim=True)
    scores = -torch.cosine_similarity(layer.keys, unit.mean(1, keepdim=True), dim=-1)
    return scores.masked_fill(layer.pos < 1, math.inf)


def lag_kv(layer: Layer, t: int) -> Tensor:
    """Partitions of 2 after one sink; every partition is whole when its successor is."""
    found = torch.full(layer.pos.shape, math.inf, dtype=layer.keys.dtype)
    for h in range(len(layer.pos)):
        for start in range(1, t - 2, 2):
            parts = []
            for kind in (0, 1):
                own, after = (
                    torch.stack([layer.history[j][kind][h] for j in range(a, a + 2)])
                    for a in (start, start + 2)
                )
                lo, hi = after.amin(0), after.amax(0)
                parts.append(((own - lo) / (hi - lo)).std(-1, correction=0).softmax(0))
            for j in (start, start + 1):
                found[h, layer.pos[h] == j] = (parts[0] + parts[1])[j - start] / 2
    return found


ORACLES: dict[str, Callable[[Layer, int], Tensor]] = {
    "tova:budget=6": tova,
    "tova:budget=6:per=head:sinks=1": tova_head,
    "h2o:budget=6:recent=3": h2o,
    "h2o:budget=6:recent=3:per=layer": h2o_layer,
    "window:budget=6:sinks=2": window,
    "keynorm:budget=6": key_norm,
    "keydiff:budget=6:sinks=1": key_diff,
    "lagkv:budget=6:lag=2:sinks=1": lag_kv,
}


def oracle(model, ids: Tensor, budget: int, score: Callable) -> tuple[Tensor, list[Tensor]]:
    """Eager attention with `output_attentions`, evicting between calls on a DynamicCache."""
    cache, layers, logits = DynamicCache(), {}, []
    for t in range(ids.shape[1]):
        out = model(
            ids[:, t : t + 1],
            past_key_values=cache,
            use_cache=True,
            position_ids=torch.tensor([[t]]),
            output_attentions=True,
        )
        logits.append(out.logits)
        for i, theirs in enumerate(cache.layers):
            layer = layers.setdefault(i, Layer())
            layer.add(out.attentions[i][0, :, 0], theirs.keys[0], theirs.values[0], t)
            n = layer.pos.shape[1]
            if n <= budget:
                continue
            gone = score(layer, t).argmin(-1)
            keep = torch.stack([torch.cat([torch.arange(g), torch.arange(g + 1, n)]) for g in gone])
            theirs.keys, theirs.values = (
                x[0][torch.arange(len(keep)).unsqueeze(1), keep].unsqueeze(0)
                for x in (theirs.keys, theirs.values)
            )
            layer.pos, layer.mass = layer.pos.gather(1, keep), layer.mass.gather(1, keep)
    return torch.cat(logits, 1), [layer.pos for layer in layers.values()]


@pytest.mark.parametrize(
    "policy, name", [(p, n) for p in ORACLES for n in MODELS_OF.get(p.split(":")[0], EIGHT)]
)
def test_survivors_are_those_of_an_oracle(policy: str, name: str) -> None:
    """Exact mode in one call, and token by token: transformers' own attention agrees."""
    # No token twice: equal values would leave LagKV's ranges empty.
    model, ids = tiny(name), torch.randperm(37, generator=torch.Generator().manual_seed(4))
    ids = 3 + ids[:LENGTH].unsqueeze(0)
    want, places = oracle(model, ids, build_policy(policy).budget, ORACLES[policy])
    for size in (LENGTH, 1):
        cache = BoundedCache(model, policy)
        pieces = [model(p, past_key_values=cache).logits for p in ids.split(size, 1)]
        assert (torch.cat(pieces, 1) - want).abs().max() < 5e-6 * want.abs().max()
        for state, theirs in zip(cache.states, places, strict=True):
            assert torch.equal(state.pos[0].sort(-1).values, theirs)
