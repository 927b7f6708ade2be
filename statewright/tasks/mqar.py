"""Multi-query associative recall: pairs first, then every key once more, far away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer


@dataclass(frozen=True)
class MQAR:
    """`pairs` keys with their values, then each key again: recall its value (arXiv:2312.04927).

    k_1 v_1 ... k_P v_P, then `length` tokens in all, where each key stands once more, followed by
    its value, in slots drawn with weight slot^(power - 1); blanks between. Scored: the value
    after each repeated key, by its rank among all tokens. Token ids `first` .. `first + vocab - 1`
    are used: the blank, then keys, then as many values; no tokenizer is needed. Chance, for a model
    that knows the values but not which belongs to which key: 1 / pairs. Differs from Zoology's
    generator: blanks where that draws random tokens, and the answer follows its query.
    Raises ValueError if keys or slots do not suffice.
    """

    pairs: int = 16
    length: int = 128
    vocab: int = 128
    first: int = 128
    power: float = 0.01
    version: ClassVar[int] = 1

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        keys, slots = (self.vocab - 1) // 2, (self.length - 2 * self.pairs) // 2
        if not 1 <= self.pairs <= keys:
            raise ValueError(f"mqar: pairs={self.pairs}, expected 1 to {keys} for {self.vocab} ids")
        if slots < self.pairs:
            raise ValueError(
                f"mqar: length={self.length}, expected at least {4 * self.pairs} for {self.pairs} "
                "pairs and their queries"
            )
        generator = torch.Generator().manual_seed(seed)
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        return Batch(tuple(self._sample(keys, weights, generator) for _ in range(n)))

    def _sample(self, keys: int, weights: Tensor, generator: torch.Generator) -> Sample:
        P = self.pairs
        chosen = torch.randperm(keys, generator=generator)[:P] + self.first + 1
        values = torch.randperm(keys, generator=generator)[:P] + self.first + 1 + keys
        ids = torch.full((self.length,), self.first)
        ids[: 2 * P] = torch.stack([chosen, values], 1).flatten()
        at = 2 * P + 2 * torch.multinomial(weights, P, generator=generator)
        ids[at], ids[at + 1] = chosen, values
        targets = torch.full_like(ids, IGNORED)
        targets[at] = values
        return Sample(ids, targets=targets)
