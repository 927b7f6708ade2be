"""Text in, batches out: documents, stateful lanes, and a batch as a pure function of the step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
_PART, _BLOCK = 1 << 14, 1 << 20


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids (N,), the indices at which documents begin, and the bytes of text they stand for.

    Every document ends with the tokenizer's end-of-text token if it has one and there are
    several documents. The tokens may be mapped from a file; `origin` then says which part of
    which data they are, so that nobody reads them all to find out.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int
    origin: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, its end-of-text included."""
        return int(np.diff(self.starts, append=self.num_tokens).max())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and document starts (of their origin, if they are mapped)."""
        if self.origin:
            return hashlib.sha256(self.origin.encode()).hexdigest()
        digest = hashlib.sha256()
        for begin in range(0, self.num_tokens, _BLOCK):
            digest.update(self.tokens[begin : begin + _BLOCK].astype(np.int64).tobytes())
        digest.update(self.starts.astype(np.int64).tobytes())
        return digest.hexdigest()

    def joined(self) -> Corpus:
        """As one document: states and targets cross its boundaries (the end-of-text remains)."""
        origin = f"{self.origin} joined" if self.origin else ""
        return replace(self, starts=self.starts[:1], origin=origin)

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """The first tokens and the last `share` of them (rounded), documents cut where needed."""
        cut = self.num_tokens - round(self.num_tokens * share)
        return self._part(0, cut), self._part(cut, self.num_tokens)

    def _part(self, begin: int, end: int) -> Corpus:
        inside = self.starts[(self.starts > begin) & (self.starts < end)] - begin
        num_bytes = round(self.num_bytes * (end - begin) / max(1, self.num_tokens))
        origin = f"{self.origin}[{begin}:{end}]" if self.origin else ""
        return Corpus(self.tokens[begin:end], np.concatenate([[0], inside]), num_bytes, origin)


def encoder(
    tokenizer: PreTrainedTokenizerBase, literal: bool = False
) -> Callable[[str], Iterator[list[int]]]:
    """Token ids of a text, part by part; special tokens are never added.

    literal: a special token's name in the text, such as `<|endoftext|>`, is text like any other.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    options = {"split_special_tokens": True} if literal else {}
    if literal and backend is not None:
        # A copy: the switch would change the tokenizer we were given.
        backend = Tokenizer.from_str(backend.to_str())
        backend.encode_special_tokens = True

    def ids(text: str) -> Iterator[list[int]]:
        for begin in range(0, len(text), _PART):
            part = text[begin : begin + _PART]
            if backend is None:
                yield tokenizer.encode(part, add_special_tokens=False, **options)
            else:
                yield backend.encode(part, add_special_tokens=False).ids

    return ids


def encode(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each piece, as of a prompt: a special token's name stands for that token."""
    ids = encoder(tokenizer)
    for piece in pieces:
        yield from ids(piece)


def corpus_of(documents: Sequence[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Tokenize documents, each given as an iterable of pieces of text.

    A literal `<|endoftext|>` in a text is text: only what is given as documents is a boundary.
    """
    end = tokenizer.eos_token_id if len(documents) > 1 else None
    dtype, ids = token_dtype(tokenizer), encoder(tokenizer, literal=True)
    parts, starts, num_tokens, num_bytes = [], [], 0, 0
    for document in documents:
        starts.append(num_tokens)
        for piece in document:
            num_bytes += len(piece.encode("utf-8"))
            for part in ids(piece):
                parts.append(np.array(part, dtype=dtype))
                num_tokens += len(part)
        if end is not None:
            parts.append(np.array([end], dtype=dtype))
            num_tokens += 1
    return Corpus(np.concatenate(parts), np.array(starts, dtype=np.int64), num_bytes)


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> type[np.integer]:
    """The narrowest of uint16 and int32 that holds every token."""
    return np.uint16 if len(tokenizer) < 2**16 else np.int32


@dataclass(frozen=True, eq=False)
class Batch:
    """ids and labels (B, T) int64, labels -100 where ignored; reset (B, T) bool."""

    ids: Tensor
    labels: Tensor
    reset: Tensor

    def rows(self, part: slice) -> Batch:
        return Batch(self.ids[part], self.labels[part], self.reset[part])

    def columns(self, part: slice) -> Batch:
        return Batch(self.ids[:, part], self.labels[:, part], self.reset[:, part])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device), self.reset.to(device))


@dataclass(frozen=True, eq=False)
class Lanes:
    """Stateful lanes: row b of consecutive batches is consecutive text.

    The corpus is one ring of tokens, cut into `num_lanes` stretches; batch i holds the i-th
    `length` tokens of each. A row resets where a document begins and where its lane begins anew,
    so a carried state only ever sees its own document. From the second pass on, the ring is
    turned by an amount drawn from (seed, phase, pass): cuts fall elsewhere. `batch(step)` depends
    on nothing but its arguments. `phase` counts the lengths of a curriculum.
    """

    corpus: Corpus
    num_lanes: int
    length: int
    seed: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        need = self.num_lanes * self.length + 1
        if self.corpus.num_tokens < need:
            raise ValueError(
                f"the text has {self.corpus.num_tokens:,} tokens, but {self.num_lanes} lanes of "
                f"{self.length} need {need:,}; use more text, fewer lanes or a shorter length"
            )

    @property
    def num_targets(self) -> int:
        return self.corpus.num_tokens - 1

    @property
    def steps_per_pass(self) -> int:
        return self.num_targets // self.num_lanes // self.length

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, counted from 0 over all passes, or some of its rows."""
        passes, index = divmod(step, self.steps_per_pass)
        stretch = self.num_targets // self.num_lanes
        lanes = np.arange(self.num_lanes)[rows]
        begins = lanes * stretch + self._turn(passes) + index * self.length
        at = (begins[:, None] + np.arange(self.length)) % self.num_targets
        reset = self._begin_document(at)
        reset[:, 0] |= index == 0
        return self._batch(at, reset)

    def _turn(self, passes: int) -> int:
        if passes == self.phase == 0:
            return 0
        generator = torch.Generator().manual_seed(
            (self.seed + 7919 * self.phase) * 1_000_003 + passes
        )
        return int(torch.randint(self.num_targets, (), generator=generator))

    def _begin_document(self, at: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self.corpus.starts, at)
        found[found == len(self.corpus.starts)] = 0
        return self.corpus.starts[found] == at

    def _batch(self, at: np.ndarray, reset: np.ndarray) -> Batch:
        ids = torch.from_numpy(self.corpus.tokens[at].astype(np.int64))
        labels = torch.from_numpy(self.corpus.tokens[at + 1].astype(np.int64))
        labels[torch.from_numpy(self._begin_document(at + 1))] = IGNORED
        return Batch(ids, labels, torch.from_numpy(reset))


def stretches(corpus: Corpus, num_rows: int, length: int) -> Iterator[Batch]:
    """One pass over a corpus for evaluation: every target once, in `num_rows` stretches.

    The last piece is shorter; the last row may be, and its labels beyond the text are ignored.
    """
    lanes = Lanes(corpus, num_rows, 1)
    stretch = -(-lanes.num_targets // num_rows)
    for begin in range(0, stretch, length):
        columns = np.arange(begin, min(begin + length, stretch))
        at = np.arange(num_rows)[:, None] * stretch + columns
        beyond = at >= lanes.num_targets
        at[beyond] = lanes.num_targets - 1
        reset = lanes._begin_document(at)
        reset[:, 0] |= begin == 0
        batch = lanes._batch(at, reset)
        batch.labels[torch.from_numpy(beyond)] = IGNORED
        yield batch
