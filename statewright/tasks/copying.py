"""Copying: data tokens at the start, to be repeated in order after a gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from statewright.tasks.selective_copy import SelectiveCopy


@dataclass(frozen=True)
class Copying(SelectiveCopy):
    """`tokens` data tokens, blanks up to `length`, then as many markers (arXiv:1511.06464).

    At the markers the data tokens are due in their order. Ids: 0 the marker, 1 .. vocab - 2 data,
    vocab - 1 the blank. Chance: one data id. No tokenizer is needed. Differs from the paper: a
    marker stands at every answer, where that has one delimiter and then blanks. Raises ValueError
    if the tokens do not fit into the length.
    """

    length: int = 256
    label: ClassVar[str] = "copying"

    def places(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.arange(self.tokens).expand(n, -1)
