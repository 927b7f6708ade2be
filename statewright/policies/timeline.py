"""Who sees whom: T new tokens after N kept ones, with padding, resets and evictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Timeline:
    """The N old and T new tokens of one call as M = N + T entries, old ones first.

    pos (B, H, M): the token's index since its row's reset, -1 where there is none (an empty slot,
    a masked token). segment (B, M): resets before it in this call. seen (B, T): tokens since the
    reset, after each column; active (B, T): unmasked columns. Old entries precede column 0.
    plain: no old entries, masked columns or resets, so that a column sees itself and all before.
    """

    pos: Tensor
    segment: Tensor
    seen: Tensor
    active: Tensor
    num_old: int
    plain: bool = False

    @classmethod
    def of(
        cls, pos: Tensor, seen: Tensor, T: int, mask: Tensor | None, reset: Tensor | None
    ) -> Timeline:
        """From the slots' pos (B, H, N), the row's seen (B,) and the call's flags (B, T)."""
        B, H, N = pos.shape
        active = pos.new_ones(B, T, dtype=torch.bool) if mask is None else mask
        count = active.cumsum(1)
        if reset is None:
            segment = torch.zeros_like(count)
            now = count + seen.unsqueeze(1)
        else:
            starts = reset & active
            segment = starts.cumsum(1)
            before = torch.where(starts, count - 1, 0)
            base = before.cummax(1).values if T else before
            now = count - base + torch.where(segment == 0, seen.unsqueeze(1), 0)
        new = torch.where(active, now - 1, -1)
        entries = torch.cat([pos, new.unsqueeze(1).expand(B, H, T)], 2)
        segments = torch.cat([segment.new_zeros(B, N), segment], 1)
        plain = N == 0 and mask is None and reset is None
        return cls(entries, segments, now, active, N, plain)

    @property
    def query_pos(self) -> Tensor:
        """The position of each new token, 0 for a masked one: (B, T)."""
        return self.pos[:, 0, self.num_old :].clamp(min=0)

    @property
    def query_segment(self) -> Tensor:
        return self.segment[:, self.num_old :]

    def visible(
        self, begin: int, end: int, index: Tensor, died: Tensor | None, window: int | None
    ) -> Tensor:
        """(B, H, end - begin, A) bool: which of the entries `index` (B, H, A) the columns see.

        died (B, H, M): the last column that sees an entry; None: all do. `index` may be M, which
        is nobody. A window hides tokens that are `window` or more positions back.
        """
        at = torch.arange(begin, end, device=index.device).view(1, 1, -1, 1)
        entry = index.clamp(max=self.pos.shape[-1] - 1)
        pos = torch.where(index == entry, self.pos.gather(-1, entry), -1).unsqueeze(2)
        segment = self.segment.unsqueeze(1).expand_as(self.pos).gather(-1, entry).unsqueeze(2)
        seen = (pos >= 0) & (entry.unsqueeze(2) - self.num_old <= at)
        seen = seen & (segment == self.query_segment[:, None, begin:end, None])
        if died is not None:
            seen = seen & (died.gather(-1, entry).unsqueeze(2) >= at)
        if window is not None:
            seen = seen & (self.query_pos[:, None, begin:end, None] - pos < window)
        return seen

    def remaining(self, died: Tensor | None, window: int | None) -> Tensor:
        """(B, H, M) bool: the entries that a token after this call can still see."""
        left = self.pos >= 0
        if self.seen.shape[1] == 0:
            return left
        left = left & (self.segment == self.query_segment[:, -1:]).unsqueeze(1)
        if died is not None:
            left = left & (died == NEVER)
        if window is not None:
            left = left & (self.seen[:, -1].view(-1, 1, 1) - self.pos < window)
        return left
