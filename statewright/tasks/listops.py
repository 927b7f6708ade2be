"""ListOps: nested operations on digits, to be worked out (Nangia and Bowman, arXiv:1804.06028)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import IGNORED, Batch, Sample, Tokenizer

WORDS = (*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]", "=", ".")
MIN, CLOSE, MARKER, BLANK = (WORDS.index(word) for word in ("[MIN", "]", "=", "."))
_OPERATIONS: dict[int, Callable[[list[int]], int]] = {
    WORDS.index("[MIN"): min,
    WORDS.index("[MAX"): max,
    WORDS.index("[MED"): lambda values: int(statistics.median(values)),
    WORDS.index("[SM"): lambda values: sum(values) % 10,
}


@dataclass(frozen=True)
class ListOps:
    """Expressions of `low` to `high` tokens; their value, a digit, is due at the marker `=`.

    A node is a digit with probability 0.75, or at depth `depth`; else one of MIN, MAX, MED (the
    median, rounded down) and SM (sum modulo 10) of 2 to `arguments` nodes. The root is an
    operation; expressions of other lengths are drawn again. Ids are places in `WORDS`; rows are
    filled up with blanks after the marker. Differs from LRA (arXiv:2011.04006: 500 to 2,000
    tokens, 10 arguments) in its default lengths. Raises ValueError for lengths that cannot be.
    """

    low: int = 5
    high: int = 40
    arguments: int = 5
    depth: int = 10
    version: ClassVar[int] = 1
    vocab: ClassVar[int] = len(WORDS)
    chance: ClassVar[float] = 0.1

    def draw(self, n: int, seed: int, tokenizer: Tokenizer | None = None) -> Batch:
        if not 4 <= self.low <= self.high or self.arguments < 2 or self.depth < 2:
            raise ValueError(
                f"listops: low={self.low}, high={self.high}, arguments={self.arguments}, depth="
                f"{self.depth}; expected 4 <= low <= high tokens, 2 or more arguments and levels"
            )
        if self.depth == 2 and self.low > self.arguments + 2:
            raise ValueError(f"listops: low={self.low} tokens do not fit into one operation")
        uniforms = _uniforms(torch.Generator().manual_seed(seed))
        drawn = [self._expression(uniforms) for _ in range(n)]
        T = max(len(tokens) for tokens, _ in drawn) + 1
        return Batch(tuple(self._sample(tokens, value, T) for tokens, value in drawn))

    def _sample(self, tokens: list[int], value: int, T: int) -> Sample:
        ids, targets = torch.full((T,), BLANK), torch.full((T,), IGNORED)
        ids[: len(tokens) + 1] = torch.tensor([*tokens, MARKER])
        targets[len(tokens)] = value
        return Sample(ids, targets=targets)

    def _expression(self, uniforms: Iterator[float]) -> tuple[list[int], int]:
        while True:
            tokens: list[int] = []
            value = self._node(tokens, 1, uniforms)
            if value is not None and self.low <= len(tokens) <= self.high:
                return tokens, value

    def _node(self, tokens: list[int], level: int, uniforms: Iterator[float]) -> int | None:
        """Append a node's tokens; its value, or None once they are too many."""
        if level > 1 and (level >= self.depth or next(uniforms) < 0.75):
            tokens.append(int(next(uniforms) * 10))
            return tokens[-1]
        operation = MIN + int(next(uniforms) * len(_OPERATIONS))
        tokens.append(operation)
        values = []
        for _ in range(2 + int(next(uniforms) * (self.arguments - 1))):
            value = self._node(tokens, level + 1, uniforms)
            if value is None or len(tokens) >= self.high:
                return None
            values.append(value)
        tokens.append(CLOSE)
        return _OPERATIONS[operation](values)


def value_of(tokens: list[int]) -> int:
    """The value of an expression, read from its tokens. ValueError if it is none."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token in _OPERATIONS:
            stack.append([token])
        elif token == CLOSE and len(stack) > 1 and len(stack[-1]) > 2:
            operation, *values = stack.pop()
            stack[-1].append(_OPERATIONS[operation](values))
        elif token < 10:
            stack[-1].append(token)
        else:
            raise ValueError(f"not an expression: {' '.join(WORDS[t] for t in tokens)}")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"not an expression: {' '.join(WORDS[t] for t in tokens)}")
    return stack[0][0]


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    while True:
        yield from torch.rand(1024, generator=generator).tolist()
