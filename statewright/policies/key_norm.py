"""KeyNorm: keys with a large norm get little attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from statewright.policies.base import Eviction, Slots, protect


@dataclass(frozen=True)
class KeyNorm(Eviction):
    """Drop the key with the largest L2 norm, per head (arXiv:2406.11430, eq. 1).

    The first `sinks` tokens never leave. Differs from the authors' code, which prunes a prompt
    once to a ratio: here after every token, to a budget.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=KeyNorm(budget=4))
    >>> state.pos.shape
    torch.Size([1, 4, 4])
    """

    sinks: int = 0
    needs: ClassVar = "keys"

    @property
    def smallest(self) -> int:
        return self.sinks + 1

    def score(self, slots: Slots) -> Tensor:
        return protect(-slots.k.norm(dim=-1), slots.pos < self.sinks)
