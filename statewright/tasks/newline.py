"""Newlines: a text without information, on which a state that forgets too little explodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode


@dataclass(frozen=True)
class Newline:
    """Perplexity of `length` newlines (arXiv:2410.07145).

    One token id, repeated: tokenizers merge runs of newlines, so the text itself would be other
    tokens. Nothing is drawn: there is one sample, whatever n and the seed are. Raises ValueError
    for a length below 2 and a tokenizer without newlines.
    """

    length: int = 4096
    version: ClassVar[int] = 1

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        if self.length < 2:
            raise ValueError(f"newline: length={self.length}, expected at least 2 tokens")
        ids = encode(tokenizer, "\n")
        if not ids:
            raise ValueError("newline: the tokenizer has no token for a newline")
        return Batch((Sample(torch.full((self.length,), ids[-1])),))
