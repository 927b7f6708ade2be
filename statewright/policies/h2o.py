"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from statewright.policies.base import Eviction, Slots, logit_size, protect


@dataclass(frozen=True)
class H2O(Eviction):
    """Keep the last `recent` tokens and the rest's heaviest (arXiv:2306.14048, algorithm 1).

    mass_h[j] += sum over new queries of a_h[., j], summed over the query heads that share a key
    head; it leaves with its token. recent: half the budget if None; recent = budget is Window.
    per="head" as the authors; per="layer": the mean over heads decides for all. The three official
    implementations differ; this is `real_drop`: the query sees budget + 1 tokens, the rows are
    physically gone, the sums are causal.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=H2O(budget=4))
    >>> state.pos.shape
    torch.Size([1, 4, 4])
    """

    recent: int | None = None
    per: Literal["head", "layer"] = "head"
    needs: ClassVar = "column_sums"
    mark_names: ClassVar = ("mass",)

    def __post_init__(self) -> None:
        if self.per not in ("layer", "head"):
            raise ValueError(f"h2o: per={self.per!r}, expected 'head' or 'layer'")
        if self.recent is not None and self.recent < 0:
            raise ValueError(f"h2o: recent={self.recent}, expected 0 or more tokens")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return max(self.recent or 0, 1)

    def observe(self, slots: Slots) -> dict[str, Tensor]:
        assert slots.rows is not None
        return {"mass": slots.marks["mass"] + slots.rows.sum((2, 3))}

    def score(self, slots: Slots) -> Tensor:
        mass = slots.marks["mass"]
        if self.per == "layer":
            mass = mass.mean(1, keepdim=True).expand_as(mass)
        assert isinstance(self.budget, int)
        recent = self.budget // 2 if self.recent is None else self.recent
        return protect(mass, slots.pos >= (slots.seen - recent).view(-1, 1, 1))

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        return score * logit_size(slots, self.per == "layer")
