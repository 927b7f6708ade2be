"""Six tasks of the Chomsky hierarchy (Deletang et al., arXiv:2207.02098; xLSTM, 2405.04517).

The minimal-RNN paper trains on up to 40 tokens and tests up to 256 (arXiv:2410.01201, App. D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer

MARKER = 0


@dataclass(frozen=True)
class Chomsky:
    """A word of symbols, then a marker at which the answer is due; ids: 0 the marker, 1 .. symbols.

    All n words have one length, drawn from [`low`, `high`] by the seed (as the authors' batches).
    Classes are numbered from 1 too. Raises ValueError for an empty range of lengths.
    """

    low: int = 1
    high: int = 40
    version: ClassVar[int] = 1
    symbols: ClassVar[int]
    classes: ClassVar[int]

    @property
    def vocab(self) -> int:
        """Ids in use."""
        return 1 + max(self.symbols, self.classes)

    @property
    def chance(self) -> float:
        return 1 / self.classes

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"low={self.low}, high={self.high}: expected 1 <= low <= high tokens")
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(self.low, self.high + 1, (1,), generator=generator))
        words, answers = self.solve(n, length, generator)
        ids = F.pad(words, (0, answers.shape[1]), value=MARKER)
        targets = F.pad(answers, (words.shape[1], 0), value=IGNORED)
        return Batch(tuple(Sample(i, targets=t) for i, t in zip(ids, targets)))

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Words (n, about length) and answers (n, markers)."""
        raise NotImplementedError

    def words(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, self.symbols + 1, (n, length), generator=generator)


class BucketSort(Chomsky):
    """The word's symbols, of five, in ascending order: as many markers as symbols."""

    symbols, classes = 5, 5

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = self.words(n, length, generator)
        return words, words.sort(1).values


class MissingDuplicate(Chomsky):
    """A binary word twice, one symbol of the second copy hidden (id 3): which was it?"""

    symbols, classes = 3, 2

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = max(1, length // 2)
        word = torch.randint(1, 3, (n, half), generator=generator)
        at = torch.randint(half, (n, 1), generator=generator)
        return torch.cat([word, word.scatter(1, at, 3)], 1), word.gather(1, at)


class CycleNavigation(Chomsky):
    """Where a walk on a cycle of five ends that starts at 1; moves: 1 stay, 2 forward, 3 back."""

    symbols, classes = 3, 5

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = self.words(n, length, generator)
        moves = torch.tensor([0, 0, 1, -1])[words]
        return words, moves.sum(1, keepdim=True) % 5 + 1


class EvenPairs(Chomsky):
    """Is the number of places where a binary word changes even? 2 for yes, 1 for no."""

    symbols, classes = 2, 2

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = self.words(n, length, generator)
        changes = (words[:, 1:] != words[:, :-1]).sum(1, keepdim=True)
        return words, 2 - changes % 2


class Majority(Chomsky):
    """The most frequent of 64 symbols; of several, the largest id."""

    symbols, classes = 64, 64

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = self.words(n, length, generator)
        counts = F.one_hot(words, self.symbols + 1).sum(1)
        return words, self.symbols - counts.flip(1).argmax(1, keepdim=True)


class MajorityCount(Chomsky):
    """How often the most frequent of 64 symbols stands in the word, modulo 64."""

    symbols, classes = 64, 64

    def solve(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        words = self.words(n, length, generator)
        most = F.one_hot(words, self.symbols + 1).sum(1).amax(1, keepdim=True)
        return words, most % self.classes + 1


CHOMSKY: dict[str, type[Chomsky]] = {
    "bucket-sort": BucketSort,
    "missing-duplicate": MissingDuplicate,
    "cycle-navigation": CycleNavigation,
    "even-pairs": EvenPairs,
    "majority": Majority,
    "majority-count": MajorityCount,
}
