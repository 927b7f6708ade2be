"""The way back of a Session: snapshots on a byte budget, and the tokens between them."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import numpy as np
from torch import Tensor

from statewright.state import State
from statewright.token_hash import RollingHash

# Token bytes kept in memory before a log moves to a temporary file.
_SPOOL_BYTES = 8 * 1024**2
# Single tokens between snapshots: what a way back reads again at most; the copy that a snapshot
# makes of a state that is written in place is paid once in so many.
_SINGLES = 64


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything a Session needs to stand at `position` again."""

    position: int
    state: State
    logits: Tensor | None
    hash: RollingHash

    @cached_property
    def nbytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.numel() * self.logits.element_size()
        return self.state.nbytes + logits


class TokenLog:
    """Pieces of tokens (B, T_i) in order: appended, read back by piece, forked without copying.

    The tokens lie in a spooled file (memory first, a temporary file when long), the lengths of
    the pieces in an array. A fork shares what is there and appends to a file of its own.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.lengths = array("q")
        self._parts: list[tuple[IO[bytes], int, int]] = []  # file, first piece, tokens before it
        self._own: IO[bytes] | None = None
        self._num_tokens = 0

    def append(self, ids: np.ndarray) -> None:
        if self._own is None:
            self._own = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115
            self._parts.append((self._own, len(self.lengths), self._num_tokens))
        self._own.seek(self._offset(self._num_tokens - self._parts[-1][2]))
        self._own.write(ids.T.astype(np.int32).tobytes())
        self.lengths.append(ids.shape[1])
        self._num_tokens += ids.shape[1]

    def fork(self) -> TokenLog:
        other = TokenLog(self.num_rows)
        other.lengths = array("q", self.lengths)
        other._parts, other._num_tokens = list(self._parts), self._num_tokens
        self._own = None  # what is written is shared from here on, so neither appends to it
        return other

    def pieces(self, first: int) -> Iterator[np.ndarray]:
        """Pieces from index `first` on, each (B, T_i) int64."""
        before = sum(self.lengths[:first])
        for index in range(first, len(self.lengths)):
            file, _, part_begin = next(p for p in reversed(self._parts) if p[1] <= index)
            file.seek(self._offset(before - part_begin))
            raw = file.read(self._offset(self.lengths[index]))
            ids = np.frombuffer(raw, dtype=np.int32).reshape(-1, self.num_rows)
            yield ids.T.astype(np.int64)
            before += self.lengths[index]

    def truncate(self, num_pieces: int) -> None:
        """Forget the pieces after the first `num_pieces`."""
        del self.lengths[num_pieces:]
        self._num_tokens = sum(self.lengths)
        while self._parts and self._parts[-1][1] >= num_pieces:
            if self._parts.pop()[0] is self._own:
                self._own = None

    def _offset(self, num_tokens: int) -> int:
        return num_tokens * self.num_rows * 4


class History:
    """Snapshots at split points and the pieces since the oldest one.

    When the snapshots outgrow `budget` bytes they are thinned to half of it: what stays is spaced
    in proportion to its age, so that going back n tokens costs a replay of about n / constant.
    The oldest (the reach) and the newest stay. A budget below two snapshots keeps the newest
    alone: then the way back ends there. Every piece of several tokens is followed by a snapshot,
    of single ones every 64th.
    """

    def __init__(self, start: Snapshot, budget: int) -> None:
        self.budget = budget
        self.snapshots = [start]
        self.log = TokenLog(start.state.batch_size)
        self._indices = [0]  # of the piece that follows each snapshot
        self._nbytes = start.nbytes

    @property
    def reach(self) -> int:
        return self.snapshots[0].position

    def append(self, ids: np.ndarray, take: Callable[[], Snapshot]) -> bool:
        """A piece was read; `take` gives where that led. True if a snapshot holds it now."""
        self.log.append(ids)
        if ids.shape[1] == 1 and len(self.log.lengths) - self._indices[-1] < _SINGLES:
            return False
        after = take()
        self.snapshots.append(after)
        self._indices.append(len(self.log.lengths))
        self._nbytes += after.nbytes
        if self._nbytes > self.budget:
            self._thin()
        return True

    def way(self, to: int) -> tuple[Snapshot, list[np.ndarray]]:
        """The nearest snapshot before `to` tokens, and the pieces to read again from there."""
        at = self._nearest(to)
        pieces, left = [], to - self.snapshots[at].position
        for piece in self.log.pieces(self._indices[at]):
            if left == 0:
                break
            pieces.append(piece[:, :left])
            left -= pieces[-1].shape[1]
        return self.snapshots[at], pieces

    def rewind(self, to: int) -> tuple[Snapshot, list[np.ndarray]]:
        """As `way`, and what comes after that snapshot is forgotten."""
        found, at = self.way(to), self._nearest(to)
        self._keep(list(range(at + 1)))
        self.log.truncate(self._indices[at])
        return found

    def _nearest(self, to: int) -> int:
        return max(i for i, s in enumerate(self.snapshots) if s.position <= to)

    def fork(self) -> History:
        other = History.__new__(History)
        other.budget = self.budget
        other.snapshots, other._indices = list(self.snapshots), list(self._indices)
        other._nbytes = self._nbytes
        other.log = self.log.fork()
        return other

    def _thin(self) -> None:
        sizes = [s.nbytes for s in self.snapshots]
        last = len(sizes) - 1
        spacing, kept = 1 / len(sizes), list(range(len(sizes)))
        while sum(sizes[i] for i in kept) > self.budget / 2 and len(kept) > 2:
            kept = self._spaced(spacing)
            spacing *= 2
        if sizes[0] + sizes[last] > self.budget:
            kept = [last]
        self._keep(kept)
        if kept == [last]:  # no way back, so nothing to read again
            self.log, self._indices = TokenLog(self.log.num_rows), [0]

    def _spaced(self, spacing: float) -> list[int]:
        """Indices from newest to oldest whose gap is at least `spacing` of their age; both ends."""
        positions = [s.position for s in self.snapshots]
        now, kept = positions[-1], [len(positions) - 1]
        for i in range(len(positions) - 2, 0, -1):
            if positions[kept[-1]] - positions[i] >= spacing * (now - positions[i]):
                kept.append(i)
        return [0, *reversed(kept)]

    def _keep(self, indices: list[int]) -> None:
        self.snapshots = [self.snapshots[i] for i in indices]
        self._indices = [self._indices[i] for i in indices]
        self._nbytes = sum(s.nbytes for s in self.snapshots)
