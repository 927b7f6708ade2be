"""Passkey retrieval: a five-digit key hidden in repetitive text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode

PREFIX = (
    "There is an important fact hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about it.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
NEEDLE = "The passkey is {key}. Remember it. {key} is the passkey.\n"
QUESTION = "What is the passkey? The passkey is"


@dataclass(frozen=True)
class Passkey:
    """Retrieve a key 00000...99999 from `length` tokens (arXiv:2410.07145, section 4.1).

    (length - prefix - question) // block filler lines, counted in tokens; the needle replaces
    line int(depth * (lines - 1)) with depth (i + 0.5) / n for sample i of n (200 in the paper).
    Greedy; right if the key is part of the continuation. As in the authors' code the needle's own
    length is not made up for. Differs: the key is drawn from the seed, and `new_tokens` 0 means
    the paper's 5 or what the longest answer takes, where that is more (a token for the space and
    one per digit is usual today). Raises ValueError if `length` has no room for a line.
    """

    length: int = 1024
    new_tokens: int = 0
    version: ClassVar[int] = 2

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        prefix, filler, question = (encode(tokenizer, t) for t in (PREFIX, FILLER, QUESTION))
        lines = (self.length - len(prefix) - len(question)) // len(filler)
        if lines < 1:
            least = len(prefix) + len(question) + len(filler)
            raise ValueError(f"passkey: length={self.length}, expected at least {least} tokens")
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for i in range(n):
            key = f"{int(torch.randint(100_000, (), generator=generator)):05d}"
            depth = (i + 0.5) / n
            at = int(depth * (lines - 1))
            needle = encode(tokenizer, NEEDLE.format(key=key))
            ids = [*prefix, *filler * at, *needle, *filler * (lines - 1 - at), *question]
            samples.append(Sample(torch.tensor(ids), key, depth))
        longest = max((len(encode(tokenizer, f" {s.answer}")) for s in samples), default=0)
        return Batch(tuple(samples), self.new_tokens or max(longest, 5))


def by_depth(places: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[float]:
    """Accuracy in each of `bins` equal ranges of depth; NaN for one without samples."""
    found: list[list[bool]] = [[] for _ in range(bins)]
    for place, ok in zip(places, right, strict=True):
        found[min(int(place * bins), bins - 1)].append(ok)
    return [sum(b) / len(b) if b else float("nan") for b in found]


def recall_length(accuracy: Mapping[int, float], threshold: float = 0.95) -> int:
    """T_recall: the largest length whose accuracy over all depths is at least `threshold`; or 0."""
    return max((length for length, value in accuracy.items() if value >= threshold), default=0)
