"""Window and Window+i: the newest tokens, and the first few as attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from statewright.policies.base import Eviction, Slots, protect


@dataclass(frozen=True)
class Window(Eviction):
    """Keep the first `sinks` tokens and the last budget - sinks (StreamingLLM, arXiv:2309.17453).

    `sinks` counts inside the budget, as in arXiv:2401.06104's Window+i. Differs from the
    StreamingLLM release: tokens keep their original positions, they are not renumbered.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=Window(budget=4, sinks=1))
    >>> sorted(state.pos[0, 0].tolist())
    [0, 17, 18, 19]
    """

    sinks: int = 0
    needs: ClassVar = "none"

    @property
    def smallest(self) -> int:
        return self.sinks + 1

    def score(self, slots: Slots) -> Tensor:
        # All equal: the rule for ties, the oldest first, is the whole policy.
        equal = torch.zeros_like(slots.pos, dtype=torch.float32)
        return protect(equal, slots.pos < self.sinks)
