"""KeyDiff: keys that resemble the mean key are redundant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.policies.base import Eviction, Slots, protect


@dataclass(frozen=True)
class KeyDiff(Eviction):
    """Drop the key most similar to the mean of the normalised keys (arXiv:2504.15364, alg. 1).

    score_i = -cos(k_i, mean_j k_j / |k_j|), per head, over the slots held now. The first `sinks`
    tokens never leave. Differs from the authors' code: their blocks are single tokens here.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=KeyDiff(budget=4))
    >>> state.pos.shape
    torch.Size([1, 4, 4])
    """

    sinks: int = 0
    needs: ClassVar = "keys"

    @property
    def smallest(self) -> int:
        return self.sinks + 1

    def score(self, slots: Slots) -> Tensor:
        filled = (slots.pos >= 0).unsqueeze(-1)
        unit = F.normalize(slots.k, dim=-1) * filled
        # The sum serves as the mean: cosines do not see its length.
        anchor = F.normalize(unit.sum(2, keepdim=True), dim=-1)
        return protect(-(unit * anchor).sum(-1), slots.pos < self.sinks)

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        # A cosine near 0 is a sum of terms that cancel.
        return torch.ones_like(score)
