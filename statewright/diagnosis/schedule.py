"""Where a long reading is cut: everything is looked at at the ends of calls, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CALL = 1024
PROBES_PER_OCTAVE = 4
# Tokens that the comparison windows of one octave hold together, as far as four windows suffice.
_WINDOW_TOKENS = 2048
# Numbers in one call's logits: 128 MiB in float32.
LARGEST_LOGITS = 2**25


@dataclass(frozen=True)
class Call:
    """Tokens begin..end of a reading. probe: look at the states after it; watch: at the gates
    during it; octave: the log bucket its losses belong to (-1 up to the training length)."""

    begin: int
    end: int
    probe: bool
    watch: bool
    octave: int


@dataclass(frozen=True)
class Schedule:
    """A reading of `length` tokens by a model trained on texts of `train_length`.

    Probes stand at a quarter, half and the whole of the training length, then four per octave
    (P grows with log length, so that a million tokens cost what a thousand do) and at the end.
    Gates are watched over the last training length before each octave's end.
    """

    length: int
    train_length: int
    largest: int = LARGEST_CALL

    @property
    def num_octaves(self) -> int:
        """Log buckets beyond the training length; the last may be cut short."""
        return max(0, math.ceil(math.log2(self.length / self.train_length) - 1e-9))

    def octave(self, number: int) -> tuple[int, int]:
        """The tokens seen in it: more than the first number, at most the second."""
        begin = self.train_length * 2**number
        return begin, min(self.length, 2 * begin)

    @property
    def probes(self) -> list[int]:
        """Tokens seen at each look at the states."""
        T = self.train_length
        inside = {T // 4, T // 2, T}
        steps = PROBES_PER_OCTAVE * self.num_octaves
        later = {round(T * 2 ** (i / PROBES_PER_OCTAVE)) for i in range(steps + 1)}
        return sorted(p for p in {*inside, *later, self.length} if 0 < p <= self.length)

    @property
    def watches(self) -> list[int]:
        """Tokens seen at the end of each watched stretch of one training length."""
        ends = [self.train_length * 2**i for i in range(self.num_octaves + 1)]
        return [end for end in ends if end <= self.length]

    def calls(self) -> list[Call]:
        """Calls of at most `largest` tokens, cut wherever something begins or ends."""
        probes, watches, T = set(self.probes), self.watches, self.train_length
        cuts = {0, *probes, *watches, *(end - T for end in watches)}
        bounds = sorted(cuts)
        found = []
        for low, high in zip(bounds, bounds[1:]):
            watch = any(end - T <= low < end for end in watches)
            octave = -1 if low < T else int(math.log2(low / T) + 1e-9)
            for begin in range(low, high, self.largest):
                end = min(high, begin + self.largest)
                found.append(Call(begin, end, end in probes, watch, octave))
        return found

    def windows(self, octave: int) -> list[int]:
        """Where the comparison windows of one octave begin: at most 32, evenly spread."""
        begin, end = self.octave(octave)
        return _spread(begin, end - self.train_length, self.num_windows)

    def first_windows(self) -> list[int]:
        """Those that say what the model can do: in the first quarter of the text, or in its first
        eight training lengths where that is more."""
        T = self.train_length
        last = min(self.length, max(self.length // 4, 8 * T)) - T
        return _spread(0, last, 4 * self.num_windows)

    @property
    def num_windows(self) -> int:
        return max(4, min(32, _WINDOW_TOKENS // self.train_length))


def _spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` different whole numbers from first to last; none if last < first."""
    if last < first:
        return []
    return sorted({first + (last - first) * i // max(1, count - 1) for i in range(count)})


def schedule_for(ids: Tensor, train_length: int, vocab_size: int) -> Schedule:
    """For ids (B, N): N - 1 tokens are read, each has a next one. Calls fit their logits in memory.

    Raises ValueError for fewer than two training lengths.
    """
    B, N = ids.shape
    if train_length < 4:
        raise ValueError(f"train_length={train_length}, expected at least 4 tokens")
    if 2 * train_length >= N:
        raise ValueError(
            f"the text has {N:,} tokens, but two training lengths and one more are needed: "
            f"{2 * train_length + 1:,}; give a longer text or, if it is wrong, the train length"
        )
    largest = max(16, min(LARGEST_CALL, LARGEST_LOGITS // (B * vocab_size)))
    return Schedule(N - 1, train_length, largest)


def rows_at(ids: Tensor, starts: list[int], length: int) -> Tensor:
    """Windows (B * starts, length) of ids (B, N), each row's together."""
    at = torch.tensor(starts)[:, None] + torch.arange(length)
    return ids[:, at].flatten(0, 1)
