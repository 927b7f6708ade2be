"""Needle in a haystack, single and multi-key, in RULER's style, with a book as hay."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode

PREFIX = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize "
    "them. I will quiz you about them afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the text? "
    "The special magic number for {key} mentioned in the text is"
)
_FIRST = (
    "amber bold calm dark early faint gentle hollow icy jolly keen lucky mellow noble odd plain"
)
_SECOND = "anchor bridge candle desert engine forest garden harbor island jacket kettle ladder"
NAMES = [f"{a}-{b}" for a in _FIRST.split() for b in _SECOND.split()]
_SENTENCE = re.compile(r"\S.*?[.!?][\"'\u201d\u2019]?(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class NIAH:
    """Find the number that belongs to a key among `keys` needles in a book (arXiv:2404.06654).

    keys = 1 is RULER's NIAH-Single-2 (essay hay, word key, 7-digit number), keys = 4 its
    Multi-Key-1. The hay is sentences of `text` (a path) or `hay` (the text itself) from a random
    one on, as many as fit into `length` tokens. The asked needle stands before sentence
    int(depth * sentences), depth (i + 0.5) / n for sample i of n; the others stand anywhere.
    Greedy; right if the number is part of the continuation. Chance: 1 / keys, for a model that
    repeats any needle; for one needle a guessed number. Differs from RULER: our prompts, keys and
    book. Raises ValueError for a missing text and a length without room for a sentence.
    """

    length: int = 4096
    keys: int = 1
    text: str = ""
    hay: str = ""
    new_tokens: int = 16
    version: ClassVar[int] = 1

    @property
    def chance(self) -> float:
        return 1 / self.keys if self.keys > 1 else 1 / 9_000_000

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        if not 1 <= self.keys <= len(NAMES):
            raise ValueError(f"niah: keys={self.keys}, expected 1 to {len(NAMES)}")
        sentences = self._sentences()
        prefix = encode(tokenizer, PREFIX)
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for i in range(n):
            chosen = torch.randperm(len(NAMES), generator=generator)[: self.keys]
            names = [NAMES[j] for j in chosen]
            numbers = torch.randint(1_000_000, 10_000_000, (self.keys,), generator=generator)
            begin = int(torch.randint(len(sentences), (), generator=generator))
            depth = (i + 0.5) / n
            places = [depth, *torch.rand(self.keys - 1, generator=generator).tolist()]
            needles = [
                encode(tokenizer, NEEDLE.format(key=name, value=int(value)))
                for name, value in zip(names, numbers)
            ]
            question = encode(tokenizer, QUESTION.format(key=names[0]))
            room = self.length - sum(map(len, [prefix, question, *needles]))
            after = (f" {sentences[(begin + j) % len(sentences)]}" for j in itertools.count())
            hay = _fit((encode(tokenizer, sentence) for sentence in after), room, self.length)
            body = _bury(hay, needles, places)
            ids = torch.tensor([*prefix, *body, *question])
            samples.append(Sample(ids, str(int(numbers[0])), depth))
        return Batch(tuple(samples), self.new_tokens)

    def _sentences(self) -> list[str]:
        hay = self.hay
        if not hay:
            if not self.text or not Path(self.text).is_file():
                raise ValueError(f"niah: text={self.text!r} is not a file: niah:text=book.txt")
            hay = Path(self.text).read_text(encoding="utf-8")
        found = [" ".join(sentence.split()) for sentence in _SENTENCE.findall(hay)]
        if not found:
            raise ValueError("niah: the text holds no sentence")
        return found


def _bury(hay: list[list[int]], needles: list[list[int]], places: list[float]) -> list[int]:
    before: dict[int, list[int]] = {}
    for needle, place in zip(needles, places):
        before.setdefault(int(place * len(hay)), []).extend(needle)
    parts = [[*before.get(j, []), *sentence] for j, sentence in enumerate(hay)]
    return [token for part in parts for token in part]


def _fit(sentences: Iterator[list[int]], room: int, length: int) -> list[list[int]]:
    """As many sentences as fit; ValueError if that is none."""
    hay: list[list[int]] = []
    for sentence in sentences:
        if len(sentence) > room:
            break
        hay.append(sentence)
        room -= len(sentence)
    if not hay:
        least = length - room + len(sentence)
        raise ValueError(f"niah: length={length}, expected at least {least} tokens")
    return hay
