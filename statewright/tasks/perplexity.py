"""Perplexity: windows of a real text, scored token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode
from statewright.tasks.reading import read_data


@dataclass(frozen=True)
class Perplexity:
    """n windows of `length` tokens of the file `text` (arXiv:2401.06104, section 5.1: 4,096).

    The first `offset` tokens (a table of contents, say) are left out. seed 0: the windows follow
    each other from there, as the paper's chunks; any other seed draws their starts. Raises
    ValueError if the text is too short.
    """

    length: int = 4096
    text: str = ""
    offset: int = 0
    version: ClassVar[int] = 1

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        if not self.text:
            raise ValueError("perplexity: text is empty, expected a path: perplexity:text=book.txt")
        text = read_data("perplexity", self.text, "text")
        if self.offset < 0:
            raise ValueError(f"perplexity: offset={self.offset}, expected 0 or more tokens")
        ids = torch.tensor(encode(tokenizer, text))[self.offset :]
        spare = len(ids) - self.length * (n if seed == 0 else 1)
        if self.length < 2 or spare < 0:
            raise ValueError(
                f"perplexity: {n} windows of {self.length} tokens do not fit into {len(ids)} tokens"
                f"{f' after the first {self.offset}' if self.offset else ''}"
            )
        starts = torch.arange(n) * self.length
        if seed:
            generator = torch.Generator().manual_seed(seed)
            starts = torch.randint(spare + 1, (n,), generator=generator)
        return Batch(tuple(Sample(ids[s : s + self.length].clone()) for s in starts.tolist()))
