"""What a task is: a frozen description; its data are a pure function of (n, seed, tokenizer)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

IGNORED = -100


class Tokenizer(Protocol):
    """What a task needs of a tokenizer; every Hugging Face one has it."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...


@dataclass(frozen=True)
class Sample:
    """input_ids (T,) int64; answer: the text that must be in the continuation ("" for none);
    place: where in the input it hides, 0 the start, 1 the end; targets (T,): the right next token
    where it is scored, -100 elsewhere, for tasks on token ids; references: texts that the whole
    continuation is compared with by the task's `metric`; cut: tokens that did not fit in."""

    input_ids: Tensor
    answer: str = ""
    place: float = 0.0
    targets: Tensor | None = None
    references: tuple[str, ...] = ()
    cut: int = 0


@dataclass(frozen=True)
class Batch:
    """n samples, not padded; new_tokens: how many to generate (0: score the input itself)."""

    samples: tuple[Sample, ...]
    new_tokens: int = 0


class Task(Protocol):
    """`version` changes whenever the same (n, seed) would give other data or another score.

    >>> sample = build_task("passkey:length=300").draw(1, 0, byte_tokenizer()).samples[0]
    >>> len(sample.input_ids)
    210
    """

    version: ClassVar[int]

    def draw(self, n: int, seed: int, tokenizer: Tokenizer) -> Batch: ...


def digest(batch: Batch) -> str:
    """SHA-256 of all that a batch holds: equal digests, equal data."""
    found = hashlib.sha256(str(batch.new_tokens).encode())
    for sample in batch.samples:
        ids = sample.input_ids.tolist()
        targets = None if sample.targets is None else sample.targets.tolist()
        found.update(repr((ids, targets, sample.answer, sample.place)).encode())
        found.update(repr((sample.references, sample.cut)).encode())
    return found.hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of text, without the tokens that mark a beginning or an end."""
    return list(tokenizer.encode(text, add_special_tokens=False))
