"""LagKV: how far a token stands out against the tokens that follow it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from statewright.policies.base import Eviction, Slots, protect


@dataclass(frozen=True)
class LagKV(Eviction):
    """Score partitions of `lag` tokens against the next partition (arXiv:2504.04704, sec. 2.2).

    With lo, hi the channelwise range of the next partition: x~ = (x - lo) / (hi - lo), and a
    token's score is the softmax over its partition of std_channels(x~), the mean of keys' and
    values'. Per head; the first `sinks` tokens and those not scored yet (at most 2 lag) are
    protected. Differs from the authors' code, which keeps a ratio of each partition: here scores
    are kept in the state and the lowest of all leaves when the budget is exceeded.

    >>> _, state = Attention(8)(torch.randn(1, 20, 8), policy=LagKV(budget=9, lag=2))
    >>> state.pos.shape
    torch.Size([1, 4, 9])
    """

    sinks: int = 4
    lag: int = field(default=128, metadata={"least": 1})
    needs: ClassVar = "keys"
    mark_names: ClassVar = ("lag",)

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sinks < 0:
            raise ValueError(f"lagkv: lag={self.lag}, sinks={self.sinks}, expected lag >= 1")
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.sinks + 2 * self.lag

    def observe(self, slots: Slots) -> dict[str, Tensor]:
        """Score every partition whose successor is complete; 0 marks a token without a score."""
        scores, filled = slots.marks["lag"], slots.pos >= self.sinks
        part = torch.where(filled, (slots.pos - self.sinks) // self.lag, -1)
        complete = ((slots.seen - self.sinks) // self.lag).view(-1, 1, 1)
        ready = filled & (scores == 0) & (part <= complete - 2)
        if not bool(ready.any()):
            return {"lag": scores}
        for p in part[ready].unique().tolist():
            own, after = ready & (part == p), filled & (part == p + 1)
            logits = [_deviation(x, after) for x in (slots.k, slots.v)]
            new = sum(_softmax(x, own) for x in logits) / 2
            scores = torch.where(own, new, scores)
        return {"lag": scores}

    def score(self, slots: Slots) -> Tensor:
        scores = slots.marks["lag"]
        return protect(scores, (scores == 0) | (slots.pos < self.sinks))

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        # Probabilities of a softmax over numbers of order 1, kept since an earlier token.
        return torch.ones_like(score)


def _deviation(x: Tensor, reference: Tensor) -> Tensor:
    """Standard deviation over channels of x, scaled by the reference slots' range: (B, H, N)."""
    inside = reference.unsqueeze(-1)
    lo = x.masked_fill(~inside, float("inf")).amin(2, keepdim=True)
    hi = x.masked_fill(~inside, float("-inf")).amax(2, keepdim=True)
    # A channel in which all are equal, up to what layers add to a rounding, says nothing.
    noise = 64 * torch.finfo(x.dtype).eps * (hi + lo).abs().amax(-1, keepdim=True)
    scaled = torch.where(hi - lo > noise, (x - lo) / (hi - lo), 0)
    return scaled.std(-1, correction=0).nan_to_num(0.0)


def _softmax(x: Tensor, own: Tensor) -> Tensor:
    """Softmax over the own slots; at least the smallest positive number, as 0 means no score."""
    weights = x.masked_fill(~own, float("-inf")).softmax(-1)
    return weights.clamp(min=torch.finfo(x.dtype).tiny)
