"""How the next token is drawn from logits."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 or None and top_p 1 or None leave all tokens in.

    Randomness comes from the seed and the position alone. Raises ValueError for a temperature that
    is negative or not finite, a top_k below 0, a top_p outside (0, 1], and a seed outside
    0..2^63 - 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise _wrong("temperature", self.temperature, "a finite number, at least 0")
        if self.top_k is not None:
            whole("top_k", self.top_k)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise _wrong("top_p", self.top_p, "a share above 0, at most 1")
        if whole("seed", self.seed) > _LARGEST_SEED:
            raise _wrong("seed", self.seed, "at most 2^63 - 1")

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """Logits (B, V) -> ids (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Within the 64 bits that a generator takes.
        seed = (self.seed * 1_000_003 + position) % 2**64
        generator = torch.Generator().manual_seed(seed)
        probabilities = self._warpers()(None, logits.float()).softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return drawn.to(logits.device)

    def _warpers(self) -> LogitsProcessorList:
        warp = LogitsProcessorList()
        if self.temperature != 1:
            warp.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warp.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            warp.append(TopPLogitsWarper(self.top_p))
        return warp


def whole(name: str, value: Any) -> int:
    """A whole number from 0 on, of any integer type; ValueError with the argument's name."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0 or isinstance(value, bool):
        raise _wrong(name, value, "a whole number, at least 0")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"generate: {name}={value!r}, expected {expected}")
