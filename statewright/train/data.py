"""Text in, batches out: documents, stateful lanes, and a batch as a pure function of the step."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
_PIECE = 1 << 14


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids (N,), the indices at which documents begin, and the bytes of text they stand for.

    Every document ends with the tokenizer's end-of-text token if it has one and there are
    several documents.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and document starts: the same data, whatever file it came from."""
        digest = hashlib.sha256(self.tokens.astype(np.int64).tobytes())
        digest.update(self.starts.astype(np.int64).tobytes())
        return digest.hexdigest()

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """The first tokens and the last `share` of them (rounded), documents cut where needed."""
        cut = self.num_tokens - round(self.num_tokens * share)
        return self._part(0, cut), self._part(cut, self.num_tokens)

    def _part(self, begin: int, end: int) -> Corpus:
        inside = self.starts[(self.starts > begin) & (self.starts < end)] - begin
        num_bytes = round(self.num_bytes * (end - begin) / max(1, self.num_tokens))
        return Corpus(self.tokens[begin:end], np.concatenate([[0], inside]), num_bytes)


def read_text(path: str | Path) -> Iterator[str]:
    """The file's text in pieces of about 16 KB, cut before a space, never inside a character.

    Raises ValueError if the file is missing, empty, or not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, empty = "", True
    with path.open("rb") as file:
        while block := file.read(_PIECE):
            try:
                text = held + decoder.decode(block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
            if "\0" in text:
                raise ValueError(f"{path}: a binary file (it holds NUL bytes), expected text")
            empty = empty and not text.strip()
            text, held = _cut(text)
            if text:
                yield text
    try:
        held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (it ends inside a character)") from error
    if empty:
        raise ValueError(f"{path}: the file is empty")
    if held:
        yield held


def _cut(text: str) -> tuple[str, str]:
    """Cut before the last space between two words: no byte-pair token of GPT's kind spans it."""
    at = text.rfind(" ", 1, len(text) - 1)
    while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(" ", 1, at)
    return (text, "") if at <= 0 else (text[:at], text[at:])


def encode(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each piece; special tokens are never added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for piece in pieces:
        for begin in range(0, len(piece), _PIECE):
            part = piece[begin : begin + _PIECE]
            if backend is None:
                yield tokenizer.encode(part, add_special_tokens=False)
            else:
                yield backend.encode(part, add_special_tokens=False).ids


def corpus_of(documents: Sequence[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Tokenize documents, each given as an iterable of pieces of text."""
    end = tokenizer.eos_token_id if len(documents) > 1 else None
    dtype = np.uint16 if len(tokenizer) < 2**16 else np.int32
    parts, starts, num_tokens, num_bytes = [], [], 0, 0
    for document in documents:
        starts.append(num_tokens)
        for piece in document:
            num_bytes += len(piece.encode("utf-8"))
            for ids in encode([piece], tokenizer):
                parts.append(np.array(ids, dtype=dtype))
                num_tokens += len(ids)
        if end is not None:
            parts.append(np.array([end], dtype=dtype))
            num_tokens += 1
    return Corpus(np.concatenate(parts), np.array(starts, dtype=np.int64), num_bytes)


@dataclass(frozen=True, eq=False)
class Batch:
    """ids and labels (B, T) int64, labels -100 where ignored; reset (B, T) bool."""

    ids: Tensor
    labels: Tensor
    reset: Tensor


@dataclass(frozen=True, eq=False)
class Lanes:
    """Stateful lanes: row b of consecutive batches is consecutive text.

    The corpus is one ring of tokens, cut into `num_lanes` stretches; batch i holds the i-th
    `length` tokens of each. A row resets where a document begins and where its lane begins anew,
    so a carried state only ever sees its own document. From the second pass on, the ring is
    turned by an amount drawn from (seed, pass): cuts fall elsewhere. `batch(step)` depends on
    nothing but its arguments.
    """

    corpus: Corpus
    num_lanes: int
    length: int
    seed: int = 0

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

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all passes."""
        passes, index = divmod(step, self.steps_per_pass)
        stretch = self.num_targets // self.num_lanes
        begins = np.arange(self.num_lanes) * stretch + self._turn(passes) + index * self.length
        at = (begins[:, None] + np.arange(self.length)) % self.num_targets
        reset = np.isin(at, self.corpus.starts)
        reset[:, 0] |= index == 0
        return self._batch(at, reset)

    def _turn(self, passes: int) -> int:
        if passes == 0:
            return 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + passes)
        return int(torch.randint(self.num_targets, (), generator=generator))

    def _batch(self, at: np.ndarray, reset: np.ndarray) -> Batch:
        ids = torch.from_numpy(self.corpus.tokens[at].astype(np.int64))
        labels = torch.from_numpy(self.corpus.tokens[at + 1].astype(np.int64))
        labels[torch.from_numpy(np.isin(at + 1, self.corpus.starts))] = IGNORED
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
        reset = np.isin(at, corpus.starts)
        reset[:, 0] |= begin == 0
        batch = lanes._batch(at, reset)
        batch.labels[torch.from_numpy(beyond)] = IGNORED
        yield batch
