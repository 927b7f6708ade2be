"""Token files: text is tokenized once, and read back as a map of the file, of any size.

`tokens.safetensors` is a plain safetensors file: `tokens` (N,) and `starts` (M,), the indices at
which documents begin; its metadata say what was kept. The tokenizer lies beside it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from statewright.models.tokenizers import saved_tokenizer
from statewright.text_file import numbered_lines, read_text
from statewright.train.checkpoint import replace_directory
from statewright.train.data import Corpus, encoder, token_dtype

TOKENS = "tokens.safetensors"
_HEADER = 4096
_NAMES = {"uint16": "U16", "int32": "I32", "int64": "I64"}
# Kinds of local files whose byte order mark is no text.
_TEXTUAL = ("csv", "json", "text")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
_TYPES = {name: np.dtype(kind) for kind, name in _NAMES.items()}


@dataclass(frozen=True)
class Kept:
    """What a filter kept: documents and tokens, of how many; tokens of the longest document."""

    documents: int
    all_documents: int
    tokens: int
    all_tokens: int
    longest: int

    def __str__(self) -> str:
        gone = self.all_documents - self.documents
        share = gone / max(1, self.all_documents)
        lost = (self.all_tokens - self.tokens) / max(1, self.all_tokens)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens; "
            f"{gone:,} removed ({share:.1%} of the documents, {lost:.1%} of the tokens)"
        )


def write_tokens(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    min_length: int = 0,
    listen: Callable[[int], None] = lambda num_tokens: None,
) -> Kept:
    """Tokenize documents (pieces of text each) into `directory`, which appears when it is whole.

    A document ends with the tokenizer's end-of-text token if it has one; one of fewer than
    `min_length` tokens (that one not counted) is left out. In memory: one document and 8 bytes
    for each. `listen` is called with the tokens written so far.
    Raises ValueError if nothing is left, or the directory is there already.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} is there already; choose another --output-dir")
    found: list[Kept] = []

    def write(at: Path) -> None:
        tokenizer.save_pretrained(at)
        with (at / TOKENS).open("wb") as file:
            found.append(_write(file, documents, tokenizer, min_length, listen))

    replace_directory(directory, write)
    return found[0]


def read_tokens(directory: str | Path) -> tuple[Corpus, PreTrainedTokenizerBase]:
    """The corpus, mapped from its file, and its tokenizer.

    Raises ValueError if the directory was not written by `write_tokens`, or is damaged.
    """
    path = Path(directory) / TOKENS
    if not path.is_file():
        raise ValueError(f"{directory}: no {TOKENS} in it; make one with statewright data")
    with path.open("rb") as file:
        begin, header = _read_header(file, path)
    try:
        about = header["__metadata__"]
        arrays = {n: _mapped(path, begin, header[n]) for n in ("tokens", "starts")}
        corpus = Corpus(
            arrays["tokens"], np.array(arrays["starts"]), int(about["num_bytes"]), about["digest"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not written by statewright data") from error
    return corpus, saved_tokenizer(directory)


def text_documents(path: str | Path, boundary: str | None = None) -> Iterator[Iterable[str]]:
    """The documents of a text file: one, or what lies between the `boundary` strings in it."""
    if boundary is None:
        yield read_text(path)
        return
    if not boundary:
        raise ValueError("--boundary is empty, expected a string such as '<|endoftext|>'")
    held, reach = [], len(boundary) - 1
    for piece in read_text(path):
        # Pieces stay as they are, cut between words, unless a boundary may lie across two.
        short = held and min(len(held[-1]), len(piece)) < reach
        if short or (held and boundary in held[-1][-reach:] + piece[:reach]):
            piece = held.pop() + piece
        for text in piece.split(boundary)[:-1]:
            if any(part.strip() for part in (*held, text)):
                yield [*held, text]
            held = []
        held.append(piece.rpartition(boundary)[2])
    if any(part.strip() for part in held):
        yield held


def dataset_documents(
    name: str, split: str = "train", column: str = "text", stream: bool = False
) -> Iterator[list[str]]:
    """The rows of a Hugging Face dataset: `id`, `id:config`, or a local jsonl, json, csv or parquet
    file, .gz too; of .jsonl without the package `datasets`.

    stream: read while downloading, instead of first. Raises ValueError if the package, the dataset
    or the column is missing, and with the place of a row that is broken or has no text.
    """
    path, _, config = name.partition(":")
    kind = next((s[1:] for s in reversed(Path(path).suffixes) if s not in _PACKED), "")
    if kind == "jsonl" and split == "train":
        yield from _json_lines(path, column)
        return
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset {name} needs the datasets package: pip install 'statewright[data]'"
        ) from error
    kind = {"jsonl": "json", "txt": "text"}.get(kind, kind)
    where: dict[str, Any] = {"path": path, "name": config or None}
    if Path(path).is_file():
        where = {"path": kind, "data_files": path}
        if kind in _TEXTUAL:
            where["encoding"] = "utf-8-sig"
    try:
        rows = datasets.load_dataset(**where, split=split, streaming=stream)
        for number, row in enumerate(rows, 1):
            yield [_text_in(row, column, f"--dataset {name}, row {number}")]
    except _NoText:
        raise
    except Exception as error:
        raise ValueError(f"--dataset {name}, split {split}: {_root_of(error)}") from error


class _NoText(ValueError):
    """A row that has no text: told as it is."""


def _json_lines(path: str, column: str) -> Iterator[list[str]]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{where}: JSON that is nested too deeply") from error
        yield [_text_in(row, column, where)]


def _text_in(row: Any, column: str, where: str) -> str:
    if not isinstance(row, Mapping):
        raise _NoText(f"{where}: expected an object with a column {column!r}")
    if column not in row:
        raise _NoText(f"{where}: no text column {column!r}, but {', '.join(sorted(row))}")
    if row[column] is None:
        raise _NoText(f"{where}: column {column!r} is null, expected text")
    if not isinstance(row[column], str):
        raise _NoText(f"{where}: column {column!r} holds no text, but {type(row[column]).__name__}")
    return row[column]


def _root_of(error: BaseException) -> str:
    """The first line of what went wrong first: datasets wraps it in what it was doing then."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _write(
    file: BinaryIO,
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    min_length: int,
    listen: Callable[[int], None],
) -> Kept:
    ids, dtype = encoder(tokenizer, literal=True), np.dtype(token_dtype(tokenizer))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    digest, starts = hashlib.sha256(), []
    num_bytes = num_tokens = seen = removed = longest = 0
    file.write(b" " * _HEADER)
    for document in documents:
        tokens, size = [], 0
        for piece in document:
            size += len(piece.encode("utf-8"))
            tokens += [token for part in ids(piece) for token in part]
        seen, longest = seen + 1, max(longest, len(tokens))
        if not tokens or len(tokens) < min_length:
            removed += len(tokens)
            continue
        packed = np.array([*tokens, *end], dtype=dtype).tobytes()
        file.write(packed)
        digest.update(packed)
        starts.append(num_tokens)
        num_tokens, num_bytes = num_tokens + len(tokens) + len(end), num_bytes + size
        listen(num_tokens)
    kept = Kept(len(starts), seen, num_tokens, num_tokens + removed, longest)
    if not starts:
        raise ValueError(
            f"nothing is left: {seen:,} documents, the longest of {longest:,} tokens, and "
            f"--min-length {min_length:,}"
        )
    packed = np.array(starts, dtype=np.int64).tobytes()
    file.write(packed)
    digest.update(packed)
    about = {"digest": digest.hexdigest(), "num_bytes": str(num_bytes), "kept": str(kept)}
    _write_header(file, dtype, num_tokens, len(starts), about)
    return kept


def _write_header(
    file: BinaryIO, dtype: np.dtype, num_tokens: int, num_documents: int, about: dict[str, str]
) -> None:
    cut = num_tokens * dtype.itemsize
    header = {
        "__metadata__": about,
        "tokens": {
            "dtype": _NAMES[dtype.name], "shape": [num_tokens], "data_offsets": [0, cut]
        },
        "starts": {
            "dtype": "I64", "shape": [num_documents], "data_offsets": [cut, cut + 8 * num_documents]
        },
    }  # fmt: skip
    text = json.dumps(header).encode()
    assert len(text) <= _HEADER - 8
    file.seek(0)
    # Spaces after the JSON belong to the header of a safetensors file.
    file.write(struct.pack("<Q", _HEADER - 8) + text.ljust(_HEADER - 8))


def _read_header(file: BinaryIO, path: Path) -> tuple[int, dict[str, Any]]:
    try:
        size = struct.unpack("<Q", file.read(8))[0]
        if size > path.stat().st_size:
            raise ValueError("shorter than its header")
        return 8 + size, json.loads(file.read(size))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not written by statewright data") from error


def _mapped(path: Path, begin: int, entry: dict[str, Any]) -> np.ndarray:
    dtype, (count,) = _TYPES[entry["dtype"]], entry["shape"]
    low, high = entry["data_offsets"]
    if high - low != count * dtype.itemsize or begin + high > path.stat().st_size:
        raise ValueError("a tensor lies outside the file")
    return np.memmap(path, dtype=dtype, mode="r", offset=begin + low, shape=(count,))
