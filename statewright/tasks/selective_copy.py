"""Selective copying: data tokens scattered in noise, to be repeated in order at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer

MARKER = 0


@dataclass(frozen=True)
class SelectiveCopy:
    """Copy `tokens` data tokens out of `length` (arXiv:2312.00752, sec. 4.1; 2410.01201, C.1).

    `length` tokens, then `tokens` markers, at which the data tokens are due in their order. Ids:
    0 the marker, 1 .. vocab - 2 data, vocab - 1 noise; places are drawn without replacement. The
    minimal-RNN paper has length 4096, 16 tokens, vocabulary 16; so do the defaults. Chance: one
    data id. No tokenizer is needed. Raises ValueError if the tokens do not fit into the length.
    """

    length: int = 4096
    tokens: int = 16
    vocab: int = 16
    version: ClassVar[int] = 1
    label: ClassVar[str] = "selective-copy"

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 2)

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        if not 1 <= self.tokens <= self.length:
            raise ValueError(
                f"{self.label}: length={self.length}, tokens={self.tokens}; expected at least "
                "1 token to copy and a length of at least as many"
            )
        if self.vocab < 3:
            raise ValueError(f"{self.label}: vocab={self.vocab}, expected at least 3")
        generator = torch.Generator().manual_seed(seed)
        places = self.places(n, generator)
        data = torch.randint(1, self.vocab - 1, places.shape, generator=generator)
        ids = torch.full((n, self.length + self.tokens), MARKER)
        ids[:, : self.length] = self.vocab - 1
        ids.scatter_(1, places, data)
        targets = torch.full_like(ids, IGNORED)
        targets[:, self.length :] = data
        return Batch(tuple(Sample(i, targets=t) for i, t in zip(ids, targets)))

    def places(self, n: int, generator: torch.Generator) -> Tensor:
        """Where the data tokens of n samples stand, ascending: (n, tokens)."""
        order = torch.rand(n, self.length, generator=generator).argsort(1)
        return order[:, : self.tokens].sort(1).values
