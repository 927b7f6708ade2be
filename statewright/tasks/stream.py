"""Streaming perplexity: one whole text, read on and on with what the model carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode
from statewright.tasks.reading import read_data


@dataclass(frozen=True)
class Stream:
    """The loss of every token of the file `text`, each given all before it (arXiv:2401.06104, 7.2).

    One sample, whatever n and the seed are: the state, or what a policy keeps, is carried from the
    first token to the last. `length` 0: to the end of the text, else so many tokens; the first
    `offset` (a table of contents, say) are left out. What a length leaves unread is reported. An
    unbounded Transformer keeps, and attends to, all of it. Raises ValueError for a missing text
    and one with fewer than 2 tokens.
    """

    length: int = 0
    text: str = ""
    offset: int = 0
    version: ClassVar[int] = 1

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        if self.offset < 0 or self.length < 0 or self.length == 1:
            raise ValueError(
                f"stream: length={self.length}, offset={self.offset}; expected a length of 0 (all) "
                "or at least 2 tokens, and an offset of 0 or more"
            )
        text = read_data("stream", self.text, "text")
        ids = torch.tensor(encode(tokenizer, text), dtype=torch.long)[self.offset :]
        least = max(self.length, 2)
        if len(ids) < least:
            raise ValueError(
                f"stream: {self.text} has {len(ids)} tokens after the first {self.offset}, "
                f"expected at least {least}"
            )
        read = ids[: self.length or len(ids)].clone()
        return Batch((Sample(read, cut=len(ids) - len(read)),))
