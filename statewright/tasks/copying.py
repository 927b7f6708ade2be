"""Copying: data tokens at the start, to be repeated in order after a gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer

MARKER = 0


@dataclass(frozen=True)
class Copying:
    """`tokens` data tokens, blanks up to `length`, then as many markers (arXiv:1511.06464).

    At the markers the data tokens are due in their order. Ids: 0 the marker, 1 .. vocab - 2 data,
    vocab - 1 the blank. Chance: one data id. No tokenizer is needed. Differs from the paper: a
    marker stands at every answer, where that has one delimiter and then blanks. Raises ValueError
    if the tokens do not fit into the length.
    """

    length: int = 256
    tokens: int = 16
    vocab: int = 16
    version: ClassVar[int] = 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 2)

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        if not 1 <= self.tokens <= self.length:
            raise ValueError(
                f"copying: length={self.length}, tokens={self.tokens}; expected at least 1 token "
                "to copy and a length of at least as many"
            )
        if self.vocab < 3:
            raise ValueError(f"copying: vocab={self.vocab}, expected at least 3")
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(1, self.vocab - 1, (n, self.tokens), generator=generator)
        ids = torch.full((n, self.length + self.tokens), self.vocab - 1)
        ids[:, : self.tokens] = data
        ids[:, self.length :] = MARKER
        targets = torch.full_like(ids, IGNORED)
        targets[:, self.length :] = data
        return Batch(tuple(Sample(i, targets=t) for i, t in zip(ids, targets)))
