"""TOVA: token omission via attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from statewright.policies.base import Eviction, Slots, last_rows, logit_size, protect


@dataclass(frozen=True)
class TOVA(Eviction):
    """Drop the token with the least attention from the current query (arXiv:2401.06104, sec. 4).

    per="layer": the mean over all query heads of the layer, one victim for every key head (the
    paper's better variant); per="head": each key head drops its own. The current token is a legal
    victim; the first `sinks` tokens never leave (TOVA+i). Differs from the release: scores are at
    least float32 and from before dropout, ties are broken (oldest first), and pads do not exist.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=TOVA(budget=4))
    >>> state.pos.shape
    torch.Size([1, 4, 4])
    """

    sinks: int = 0
    per: Literal["layer", "head"] = "layer"
    needs: ClassVar = "last_row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("layer", "head"):
            raise ValueError(f"tova: per={self.per!r}, expected 'layer' or 'head'")

    @property
    def smallest(self) -> int:
        return self.sinks + 1

    def score(self, slots: Slots) -> Tensor:
        attention = last_rows(slots).mean(2)
        if self.per == "layer":
            attention = attention.mean(1, keepdim=True).expand_as(attention)
        return protect(attention, slots.pos < self.sinks)

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        return score * logit_size(slots, self.per == "layer")
