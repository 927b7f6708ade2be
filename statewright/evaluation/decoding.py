"""Decoding as it is measured: seconds per token and the bytes that a cache really holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from statewright.hf.arguments import by_name, cache_argument
from statewright.hf.bounded import BoundedCache
from statewright.policies import Policy, build_policy


@dataclass(frozen=True)
class Point:
    """After `tokens` tokens seen: the median seconds of the last ones, and the cache's bytes."""

    tokens: int
    seconds_per_token: float
    cache_bytes: int


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy | str | None = None,
    num_tokens: int = 256,
    every: int = 64,
) -> Iterator[Point]:
    """Greedy decoding after a prompt (B, T), token by token, never stopping at an end of text.

    A step is one call of a transformers model for all rows. Yields a Point after every `every`
    tokens; the time that passes between two of them is not counted, so several runs can take
    turns. The prompt is read first, in one call, and is no part of a Point.
    """
    if every < 1 or num_tokens < every:
        raise ValueError(f"decode: num_tokens={num_tokens}, every={every}, expected 1 <= every")
    chosen = build_policy(policy)
    cache: Cache = DynamicCache(config=model.config)
    if chosen is not None:
        cache = BoundedCache(model, chosen)
    given = {cache_argument(model): cache, "use_cache": True, **by_name(model)}
    out = model(input_ids, logits_to_keep=1, **given)
    seen = input_ids.shape[1]
    for _ in range(num_tokens // every):
        seconds = []
        for _ in range(every):
            token = out.logits[:, -1:].argmax(-1)
            began = time.perf_counter()
            out = model(token, **given)
            seconds.append(time.perf_counter() - began)
        seen += every
        yield Point(seen, statistics.median(seconds), held_bytes(cache))


def held_bytes(holder: Any) -> int:
    """Bytes of every storage that an object's tensors keep alive, each counted once, in full."""
    storages: dict[int, int] = {}
    _collect(holder, storages, set())
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int], visited: set[int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return
    if id(value) in visited or isinstance(value, torch.nn.Module | type):
        return
    visited.add(id(value))
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    for part in inside:
        _collect(part, storages, visited)
