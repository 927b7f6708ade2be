"""Needles in a haystack: single, multi-key, multi-value and multi-query, in RULER's style."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from statewright.tasks.base import Batch, Sample, Tokenizer, encode
from statewright.tasks.reading import read_data

PREFIX = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize "
    "them. I will quiz you about them afterwards.\n"
)
NEEDLE = " One of the special magic numbers for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the text? "
    "The special magic number for {key} mentioned in the text is"
)
SEVERAL = (
    "\nWhat are all the special magic numbers for {key} mentioned in the text? "
    "The special magic numbers for {key} mentioned in the text are"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FIRST = (
    "amber bold calm dark early faint gentle hollow icy jolly keen lucky mellow noble odd plain"
)
_SECOND = "anchor bridge candle desert engine forest garden harbor island jacket kettle ladder"
NAMES = [f"{a}-{b}" for a in _FIRST.split() for b in _SECOND.split()]
_SENTENCE = re.compile(r"\S.*?[.!?][\"'\u201d\u2019]?(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class NIAH:
    """Find the numbers of `queries` keys among `keys` x `values` needles (RULER, arXiv:2404.06654).

    keys=1 is RULER's Single-2 (filler="noise": Single-1), keys=4 its Multi-Key-1 (filler="needles":
    Multi-Key-2, all other needles), values=4 its Multi-Value, queries=4 its Multi-Query. The hay,
    sentences of `text` (a path) or `hay` from a random one on, fills `length` tokens. One asked
    needle stands before sentence int(depth * sentences), depth (i + 0.5) / n for sample i of n;
    all others anywhere. Greedy, `new_tokens` per number asked; the score is the share of the
    numbers in the continuation. Chance: as many needles as are asked, any; for one needle a guess.
    Differs from RULER: our prompts, names and book, and the depths of one needle are even.
    Raises ValueError for a missing text and a length without room for a sentence.
    """

    length: int = 4096
    keys: int = 1
    text: str = ""
    hay: str = ""
    new_tokens: int = 16
    values: int = 1
    queries: int = 1
    filler: Literal["book", "noise", "needles"] = "book"
    version: ClassVar[int] = 1

    @property
    def num_keys(self) -> int:
        return max(self.keys, self.queries)

    @property
    def asked(self) -> int:
        """How many numbers are asked for."""
        return self.queries * self.values

    @property
    def metric(self) -> str:
        return "string-match" if self.asked > 1 else ""

    @property
    def chance(self) -> float | None:
        """None where all hay is needles: their number is up to the tokenizer."""
        if self.filler == "needles":
            return None
        return self.queries / self.num_keys if self.num_keys > self.queries else 1 / 9_000_000

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch:
        self._check()
        generator = torch.Generator().manual_seed(seed)
        sentences = self._sentences()
        drawn = [self._sample((i + 0.5) / n, sentences, generator, tokenizer) for i in range(n)]
        return Batch(tuple(drawn), self.new_tokens * self.asked)

    def _check(self) -> None:
        for name in ("keys", "queries"):
            if not 1 <= getattr(self, name) <= len(NAMES):
                raise ValueError(f"niah: {name}={getattr(self, name)}, expected 1 to {len(NAMES)}")
        if self.values < 1:
            raise ValueError(f"niah: values={self.values}, expected at least 1")
        if self.filler not in ("book", "noise", "needles"):
            raise ValueError(f"niah: filler={self.filler!r}, expected book, noise or needles")

    def _sample(
        self,
        depth: float,
        sentences: list[str],
        generator: torch.Generator,
        tokenizer: Tokenizer,
    ) -> Sample:
        count = self.num_keys * self.values
        order = torch.randperm(len(NAMES), generator=generator).tolist()
        names = [NAMES[j] for j in order[: self.num_keys]]
        numbers = torch.randint(1_000_000, 10_000_000, (count,), generator=generator).tolist()
        begin = int(torch.randint(len(sentences), (), generator=generator)) if sentences else 0
        places = [depth, *torch.rand(count - 1, generator=generator).tolist()]
        needles = [
            encode(tokenizer, NEEDLE.format(key=names[i // self.values], value=number))
            for i, number in enumerate(numbers)
        ]
        prefix = encode(tokenizer, PREFIX)
        question = encode(tokenizer, self._question(names[: self.queries]))
        room = self.length - sum(map(len, [prefix, question, *needles]))
        after: Iterator[str]
        if sentences:
            after = (f" {sentences[(begin + j) % len(sentences)]}" for j in itertools.count())
        else:
            after = _others([NAMES[j] for j in order[self.num_keys :]], generator)
        hay = _fit((encode(tokenizer, sentence) for sentence in after), room, self.length)
        ids = torch.tensor([*prefix, *_bury(hay, needles, places), *question])
        wanted = tuple(map(str, numbers[: self.asked]))
        if len(wanted) == 1:
            return Sample(ids, wanted[0], depth)
        return Sample(ids, place=depth, references=wanted)

    def _question(self, names: list[str]) -> str:
        *others, last = names
        key = f"{', '.join(others)} and {last}" if others else last
        return (SEVERAL if self.asked > 1 else QUESTION).format(key=key)

    def _sentences(self) -> list[str]:
        """The hay; none where it is other needles."""
        if self.filler != "book":
            return [NOISE] if self.filler == "noise" else []
        hay = self.hay
        if not hay:
            hay = read_data("niah", self.text, "text")
        found = [" ".join(sentence.split()) for sentence in _SENTENCE.findall(hay)]
        if not found:
            raise ValueError("niah: the text holds no sentence")
        return found


def _others(names: list[str], generator: torch.Generator) -> Iterator[str]:
    """Needles that nobody asks for, without end."""
    if not names:
        raise ValueError(f"niah: filler='needles' needs fewer than {len(NAMES)} keys")
    while True:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        number = int(torch.randint(1_000_000, 10_000_000, (), generator=generator))
        yield NEEDLE.format(key=name, value=number)


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
