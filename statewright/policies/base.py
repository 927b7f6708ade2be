"""What a policy is: a frozen description; everything it remembers stands in `State.extra`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

MARK = "policy_"
_UNITS = {"b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kib|mib|gib)", re.IGNORECASE)
_LONGEST = torch.iinfo(torch.int64).max
_ROUNDINGS = 8


@dataclass(frozen=True)
class Slots:
    """What a policy sees of one layer after the current tokens were appended and attended.

    k, v (B, H, N, Dh) and pos (B, H, N), -1 for an empty slot; seen (B,), the current tokens
    included; rows (B, H, R, C, N), the attention of the C current queries of each of the R query
    heads that share a key head, in at least float32, zero for a masked query (None unless the
    policy needs it); last (B,), the row's last unmasked query among the C; marks, the policy's
    own numbers per slot (B, H, N), zero for a new slot. Nothing here carries a gradient.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    seen: Tensor
    rows: Tensor | None
    last: Tensor
    marks: Mapping[str, Tensor]
    peak: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """Changes what a state keeps. `every`: it acts when a row's `seen` is a multiple of that.

    >>> layer, x = MinGRU(8), torch.randn(1, 20, 8)
    >>> torch.equal(layer(x)[0], layer(x, policy=ForgetMore(decay=0.5))[0])
    False
    """

    every: int = field(default=1, kw_only=True, metadata={"least": 1})

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"{self.label}: every={self.every}, expected at least 1")

    @property
    def label(self) -> str:
        return type(self).__name__.lower()

    def for_layer(self, layer: int, num_layers: int) -> Self:
        """The policy of one layer out of `num_layers` that it applies to."""
        return self


@dataclass(frozen=True)
class Eviction(Policy):
    """Bounds a KVState: at most `budget` slots per key head once a row's eviction is due.

    budget: tokens per layer, or bytes per sequence over all layers, positions and scores included
    ("64KiB", also B, MiB, GiB). The current query attends to budget + 1 tokens, itself included,
    and the eviction follows (arXiv:2401.06104, algorithm 1). Between dues, N <= budget +
    (seen mod every). Of equal scores, up to rounding, the oldest leaves (`victims`).

    A subclass gives `score(slots)` (B, H, N): the lowest leaves, infinity is protected. `needs`
    says what it reads: "none", "keys" (and values), "last_row" or "column_sums" of the attention.
    `mark_names` are its own numbers per slot, brought up to date by `observe`.

    >>> sorted(n for n, kind in POLICIES.items() if issubclass(kind, Eviction))
    ['h2o', 'keydiff', 'keynorm', 'lagkv', 'random', 'tova', 'window']
    """

    budget: int | str = field(default=0, metadata={"least": 1})
    needs: ClassVar[Literal["none", "keys", "last_row", "column_sums"]] = "none"
    mark_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, str):
            _parse_bytes(self.budget, self.label)
        elif self.budget < self.smallest:
            raise ValueError(
                f"{self.label}: budget={self.budget}, expected at least {self.smallest} tokens, "
                "or bytes such as '64KiB'"
            )

    @property
    def smallest(self) -> int:
        """The smallest legal budget in tokens."""
        return 1

    def observe(self, slots: Slots) -> dict[str, Tensor]:
        """The marks after the current tokens."""
        return {}

    def score(self, slots: Slots) -> Tensor:
        """(B, H, N): the lowest leaves first; infinity is protected."""
        raise NotImplementedError

    def magnitude(self, score: Tensor, slots: Slots) -> Tensor:
        """The size of the numbers that each score (B, H, n) was computed from.

        Scores within 8 roundings of that size are equal. As it stands, for a score whose error is
        relative to itself; where larger terms enter, their size; 0 for scores that are exact.
        """
        return score.abs()

    def for_layer(self, layer: int, num_layers: int) -> Self:
        """A budget in bytes is divided equally; one in tokens holds for every layer."""
        if not isinstance(self.budget, str):
            return self
        return replace(self, budget=f"{self.in_bytes // num_layers}B")

    @property
    def in_bytes(self) -> int:
        """The budget in bytes, of a policy that has one."""
        assert isinstance(self.budget, str)
        return _parse_bytes(self.budget, self.label)

    def in_tokens(self, slot_bytes: int, row_bytes: int = 16) -> Self:
        """With the budget in tokens, given what a slot and a row of this layer cost in bytes
        (its own `seen` and the model's).

        Raises ValueError, naming the smallest legal value for this layer, if too few fit.
        """
        if not isinstance(self.budget, str):
            return self
        available = self.in_bytes
        tokens = (available - row_bytes) // slot_bytes - (self.every - 1)
        try:
            return replace(self, budget=tokens)
        except ValueError as error:
            # A policy with its own parts (recent tokens, say) may want more than `smallest`.
            least = max(self.smallest, 1)
            need = (least + self.every - 1) * slot_bytes + row_bytes
            raise ValueError(
                f"{self.label}: {available} bytes per layer and sequence hold "
                f"{max(tokens, 0)} tokens of {slot_bytes} bytes; expected at least {need} bytes "
                "per layer"
            ) from error

    def slot_bytes(self, k: Tensor, v: Tensor) -> int:
        """What one slot of k, v (B, H, N, Dh) costs over all key heads, position and marks too."""
        score = 4 if k.element_size() < 8 else 8
        per_head = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size() + 8
        return k.shape[1] * (per_head + score * len(self.mark_names))


def protect(score: Tensor, kept: Tensor) -> Tensor:
    """The score with infinity where `kept` holds."""
    return score.masked_fill(kept, float("inf"))


def victim(policy: Eviction, slots: Slots, score: Tensor) -> Tensor:
    """(B, H, 1): the slot that leaves next, where all are filled.

    It is the oldest of those whose score equals the lowest up to rounding: within 8 eps of the
    policy's `magnitude`, in the score's dtype. Matrix products round equal numbers differently
    from shape to shape, so `==` would let the machine choose. Where a score is NaN the oldest
    leaves.
    """
    least = score.amin(-1, keepdim=True)
    beyond = score > least + _slack(policy, slots, least)
    return slots.pos.masked_fill(beyond, _LONGEST).argmin(-1, keepdim=True)


def victims(policy: Eviction, slots: Slots, score: Tensor, excess: Tensor) -> Tensor:
    """(B, H, N) bool: the `excess` (B, H) slots that `victim` names one after the other.

    Equality up to rounding is not transitive, so nothing is sorted by it. What is sorted are the
    plain scores: wherever the next one is out of reach, all before it leave first. Empty slots
    (pos -1) never leave.
    """
    empty = slots.pos < 0
    excess = torch.minimum(excess, (~empty).sum(-1)).unsqueeze(-1)
    most = int(excess.max())
    slots = replace(slots, pos=slots.pos.masked_fill(empty, _LONGEST))
    score = score.masked_fill(empty, math.inf)
    if most > 1 and not bool(score.isnan().any()):
        chosen = _in_runs(policy, slots, score, excess)
        if chosen is not None:
            return chosen
    gone = torch.zeros_like(empty)
    for count in range(most):
        left = replace(slots, pos=slots.pos.masked_fill(gone, _LONGEST))
        named = victim(policy, left, score.masked_fill(gone, math.inf))
        gone = torch.zeros_like(gone).scatter_(-1, named, excess > count) | gone
    return gone


def _in_runs(policy: Eviction, slots: Slots, score: Tensor, excess: Tensor) -> Tensor | None:
    """As `victims`; None if the run of scores in which the last ones leave is no single tie.

    A run holds neighbours in the order of scores, each within reach of the one before.
    """
    ordered, order = score.sort(-1)
    reach = ordered + _slack(policy, slots, ordered)
    starts = torch.zeros_like(order, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] > reach[..., :-1]
    run = starts.cumsum(-1)
    last = run.gather(-1, (excess - 1).clamp(min=0))
    inside, before = run == last, run < last
    first = before.sum(-1, keepdim=True)
    if bool((inside & (ordered > reach.gather(-1, first))).any()):
        return None
    age = slots.pos.gather(-1, order).masked_fill(~inside, _LONGEST)
    rank = age.argsort(dim=-1, stable=True).argsort(dim=-1)
    chosen = (before | (inside & (rank < excess - first))) & (excess > 0)
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def _slack(policy: Eviction, slots: Slots, least: Tensor) -> Tensor:
    """How far above each of the scores `least` (B, H, n) another one still counts as equal."""
    limits = torch.finfo(least.dtype)
    # Finite, as an infinite score (protected, or out of sight) plus it must stay what it is.
    return (policy.magnitude(least, slots) * (_ROUNDINGS * limits.eps)).clamp(max=limits.max)


def last_rows(slots: Slots) -> Tensor:
    """The attention of each row's last unmasked query: (B, H, R, N)."""
    assert slots.rows is not None
    if slots.rows.shape[3] == 1:
        return slots.rows[:, :, :, 0]
    at = slots.last.clamp(min=0).view(-1, 1, 1, 1, 1)
    return torch.take_along_dim(slots.rows, at, 3)[:, :, :, 0]


def logit_size(slots: Slots, shared: bool) -> Tensor:
    """(B, H, 1): 1 + the largest logit in magnitude, of any head if they decide together.

    A probability's relative error is its logit's absolute one, which grows with the logits.
    """
    assert slots.peak is not None
    peak = slots.peak.amax(1, keepdim=True) if shared else slots.peak
    return 1 + peak.unsqueeze(-1)


def _parse_bytes(text: str, label: str) -> int:
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{label}: budget={text!r}, expected tokens such as 512 or bytes such as '64KiB'"
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])
