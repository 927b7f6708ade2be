"""In-context learning: a synthetic classification whose classes are new in every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer


@dataclass(frozen=True)
class InContext:
    """`shots` labelled examples of `classes` new classes, then `queries` to label.

    A class is `features` tokens drawn anew for the sample; an example is its class's tokens,
    each replaced by a random one with probability `noise`, and then its label, a token that
    belongs to that class in this sample alone. Examples go round the classes, in random order.
    Token ids `first` .. `first + vocab - 1`: features, then as many labels; no tokenizer is
    needed. Chance, for a model that knows the labels in use: 1 / classes. Raises ValueError for
    fewer shots than classes and for too small a vocabulary.
    """

    shots: int = 16
    classes: int = 4
    features: int = 2
    noise: float = 0.1
    queries: int = 4
    vocab: int = 128
    first: int = 128
    version: ClassVar[int] = 1

    @property
    def chance(self) -> float:
        return 1 / self.classes

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        if self.classes < 2 or self.shots < self.classes:
            raise ValueError(
                f"in-context: shots={self.shots}, classes={self.classes}; expected at least 2 "
                "classes and a shot of each"
            )
        if self.classes > self.vocab // 2 or self.features < 1 or self.queries < 1:
            raise ValueError(
                f"in-context: vocab={self.vocab}, features={self.features}, queries="
                f"{self.queries}; expected vocab >= 2 x classes, and at least 1 of the others"
            )
        if not 0 <= self.noise < 1:
            raise ValueError(f"in-context: noise={self.noise}, expected a probability below 1")
        generator = torch.Generator().manual_seed(seed)
        return Batch(tuple(self._sample(generator) for _ in range(n)))

    def _sample(self, generator: torch.Generator) -> Sample:
        half, count = self.vocab // 2, self.shots + self.queries
        prototypes = torch.randint(half, (self.classes, self.features), generator=generator)
        labels = torch.randperm(half, generator=generator)[: self.classes] + half
        which = torch.arange(self.shots) % self.classes
        which = which[torch.randperm(self.shots, generator=generator)]
        asked = torch.randint(self.classes, (self.queries,), generator=generator)
        which = torch.cat([which, asked])
        noisy = torch.rand(count, self.features, generator=generator) < self.noise
        other = torch.randint(half, (count, self.features), generator=generator)
        seen = torch.where(noisy, other, prototypes[which])
        ids = torch.cat([seen, labels[which].unsqueeze(1)], 1) + self.first
        targets = torch.full_like(ids, IGNORED)
        targets[self.shots :, -2] = ids[self.shots :, -1]
        return Sample(ids.flatten(), targets=targets.flatten())
