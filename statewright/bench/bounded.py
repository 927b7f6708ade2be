"""A bounded Transformer decoding: against caches that hold as much, and against all of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from statewright.bench.protocol import Case

_POLICIES = {
    "ours": "tova:budget={}",
    "ours, window": "window:budget={}:sinks=4",
    "ours, h2o": "h2o:budget={}",
    "ours, keydiff": "keydiff:budget={}",
}


def cases(quick: bool) -> Iterator[Case]:
    """Decoding steps of a Llama of the 100M class."""
    small = dict(layers=2, budget=128, seen=1024, tokens=4)
    yield decoding(**(small if quick else dict(layers=12, budget=512, seen=8192, tokens=8)))


def llama(layers: int) -> Any:
    """134 M parameters with 12 layers: width 768, 12 heads, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=16_384,
    )
    return LlamaForCausalLM(config).eval()


def decoding(layers: int, budget: int, seen: int, tokens: int) -> Case:
    """`tokens` steps after `seen` ones: lists of `budget` slots, unbounded caches of both sizes.

    The floor holds `budget` tokens without a policy, which a bounded cache cannot be ahead of but
    by saving copies; it is cut back to that length after every run.
    """
    from statewright.hf.bounded import BoundedCache

    model, ids = llama(layers), torch.randint(3, 32_000, (1, tokens))
    small, large = f"DynamicCache of {budget:,}", f"DynamicCache of {seen:,}"
    methods = {f"floor: {small}": _unbounded(model, budget, ids)}
    for name, policy in _POLICIES.items():
        cache = BoundedCache(model, policy.format(budget))
        _fill(model, cache, budget, seen)
        methods[name] = _steps(model, cache, ids)
    methods[large] = _unbounded(model, seen, ids)
    name = f"bounded decoding, {layers} layers, budget {budget:,}, {seen:,} seen, {tokens} tokens"
    return Case(name, f"floor: {small}", methods, {"ours": _idle_error(model)}, {"ours": 1e-5})


def _steps(model: Any, cache: Any, ids: Tensor) -> Callable[[], None]:
    from statewright.hf.arguments import CACHE

    @torch.no_grad()
    def run() -> None:
        for t in range(ids.shape[1]):
            model(ids[:, t : t + 1], use_cache=True, **{CACHE: cache})

    return run


def _unbounded(model: Any, length: int, ids: Tensor) -> Callable[[], None]:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(_rows(model, length)):
        cache.update(k, v, layer)
    decode = _steps(model, cache, ids)

    def run() -> None:
        decode()
        cache.crop(-ids.shape[1])

    return run


def _fill(model: Any, cache: Any, budget: int, seen: int) -> None:
    """A full list as if `seen` tokens had passed; what it holds does not change what it costs."""
    from statewright.state import KVState

    pos = torch.arange(seen - budget, seen)
    for layer, (k, v) in zip(cache.layers, _rows(model, budget)):
        shape = (1, k.shape[1], budget)
        layer.state = KVState(k=k, v=v, pos=pos.expand(shape).clone(), seen=torch.tensor([seen]))
        layer.num_columns = seen


def _rows(model: Any, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = model.config
    generator = torch.Generator().manual_seed(1)
    for _ in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        yield tuple(torch.randn(shape, generator=generator) for _ in range(2))


@torch.no_grad()
def _idle_error(model: Any) -> float:
    """A budget that is never reached against no cache at all."""
    from statewright.hf.arguments import CACHE
    from statewright.hf.bounded import BoundedCache

    ids = torch.randint(3, 32_000, (1, 24), generator=torch.Generator().manual_seed(2))
    cache = BoundedCache(model, "tova:budget=64")
    pieces = [model(p, **{CACHE: cache}).logits for p in ids.split([8, *[1] * 16], 1)]
    want = model(ids, use_cache=False).logits
    return ((torch.cat(pieces, 1) - want).abs().max() / want.abs().max()).item()
