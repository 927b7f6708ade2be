"""Random eviction: the control that every other policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from statewright.policies.base import Eviction, Slots

_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


@dataclass(frozen=True)
class Random(Eviction):
    """Drop a random token of those kept, the current one included.

    A pure function of (seed, position of the token, tokens seen): no generator, the same in every
    layer and head, and in every row that has seen as many tokens.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=Random(budget=4))
    >>> state.pos.shape
    torch.Size([1, 4, 4])
    """

    seed: int = 0
    needs: ClassVar = "none"

    def score(self, slots: Slots) -> Tensor:
        x = slots.pos * _MULTIPLIERS[0] + slots.seen.view(-1, 1, 1) * _MULTIPLIERS[1]
        return _hash(x + self.seed * 2654435761)

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        # Whole numbers below 2^24: exact.
        return torch.zeros_like(score)


def _hash(x: Tensor) -> Tensor:
    """24 mixed bits of an int64 (the finaliser of splitmix64) as float32."""
    for shift, factor in ((30, _MULTIPLIERS[1]), (27, _MULTIPLIERS[2])):
        x = (x ^ _shifted(x, shift)) * factor
    return _shifted(x ^ _shifted(x, 31), 40).to(torch.float32)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
