"""A hash of the tokens read so far, which continues from where it was saved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np


class RollingHash:
    """A hash of a row of tokens that depends on their order, not on how they were split.

    H <- H * P + (token + 1), modulo two primes below 2^31: 62 bits, enough to notice that a
    state and a text do not belong together (it is no signature). `last` (B, at most 8) are the
    tokens read last: an open UTF-8 character, of four bytes at most, behind a whole one.
    """

    _PRIMES = (2**31 - 1, 2**31 - 19)
    _BASE = 1_000_003
    _BLOCK = 4096
    _LAST = 8

    def __init__(
        self, num_rows: int, text: str | None = None, last: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.values = np.zeros((2, num_rows), dtype=np.uint64)
        self.last = np.zeros((num_rows, 0), dtype=np.int64)
        if last is not None:
            self.last = np.array(last, dtype=np.int64).reshape(num_rows, -1)
        if text is not None:
            flat = [int(part, 16) for part in text.split("-")]
            self.values = np.array(flat, dtype=np.uint64).reshape(2, num_rows)

    def update(self, ids: np.ndarray) -> None:
        """Take in ids (B, T)."""
        self.last = np.concatenate([self.last, ids[:, -self._LAST :]], 1)[:, -self._LAST :]
        for begin in range(0, ids.shape[1], self._BLOCK):
            block = ids[:, begin : begin + self._BLOCK].astype(np.uint64) + 1
            n = block.shape[1]
            for i, prime in enumerate(self._PRIMES):
                powers = _powers(self._BASE, self._BLOCK, prime)
                terms = block % prime * powers[:n][::-1] % prime
                self.values[i] = (self.values[i] * powers[n] + terms.sum(1)) % prime

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows, which may repeat."""
        self.values, self.last = self.values[:, rows], self.last[rows]

    def copy(self) -> RollingHash:
        other = RollingHash(self.values.shape[1])
        other.values, other.last = self.values.copy(), self.last
        return other

    @property
    def text(self) -> str:
        return "-".join(f"{value:x}" for value in self.values.ravel().tolist())


@cache
def _powers(base: int, count: int, prime: int) -> np.ndarray:
    """base^0 .. base^count modulo prime."""
    values = [1]
    for _ in range(count):
        values.append(values[-1] * base % prime)
    return np.array(values, dtype=np.uint64)
