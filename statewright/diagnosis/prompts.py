"""Four texts to read: the user's own, and three that need none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewright.tasks.base import encode
from statewright.tasks.passkey import FILLER, NEEDLE, PREFIX
from statewright.text_file import read_text
from statewright.train.data import encode as encode_pieces

PROMPTS = ("text", "newlines", "random", "passkey")
DEFAULT_LENGTH = 64 * 1024
_LONGEST_NAME = 255
_SPREAD = 8


def prompt_ids(name: str, length: int, tokenizer: Any, vocab_size: int, seed: int = 0) -> Tensor:
    """ids (1, length) int32 of a prompt that is not the user's text.

    newlines: one token id, repeated (tokenizers merge runs of newlines, so it is repeated as an
    id, not as text); random: uniform over the vocabulary without special tokens; passkey: the
    task's filler with a key at its head. Raises ValueError for another name.
    """
    if name == "newlines":
        ids = torch.tensor(encode(tokenizer, "\n")[-1:]).repeat(length)
    elif name == "random":
        special = set(tokenizer.all_special_ids)
        usable = torch.tensor([i for i in range(vocab_size) if i not in special])
        generator = torch.Generator().manual_seed(seed)
        ids = usable[torch.randint(len(usable), (length,), generator=generator)]
    elif name == "passkey":
        head = encode(tokenizer, PREFIX + NEEDLE.format(key="72498"))
        filler = torch.tensor(encode(tokenizer, FILLER))
        repeats = length // len(filler) + 1
        ids = torch.cat([torch.tensor(head), filler.repeat(repeats)])[:length]
    else:
        raise ValueError(f"prompt {name!r}, expected one of {', '.join(PROMPTS)}")
    return ids.to(torch.int32).unsqueeze(0)


def text_ids(text: str | Path, tokenizer: Any, most: int | None = None) -> Tensor:
    """The tokens (N,) int32 of a text, or of the file that a Path names, at most `most` of them.

    What lies beyond is not read. Raises ValueError if the file is missing, empty or no text, for
    an empty text or one that is the name of a file, and without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError("text: expected a tokenizer beside it, or token ids (B, N) in its place")
    if isinstance(text, str) and len(text) <= _LONGEST_NAME and os.path.isfile(text):
        raise ValueError(f"text: {text!r} names a file, expected Path({text!r}) to read it")
    if not text:
        raise ValueError("text: empty, expected a text, the Path of a file, or token ids (B, N)")
    parts, count = [], 0
    pieces = read_text(text) if isinstance(text, Path) else [text]
    for ids in encode_pieces(pieces, tokenizer):
        parts.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if most is not None and count >= most:
            break
    return torch.cat(parts)[:most]


def rows_of_text(
    text: str | Path, tokenizer: Any, length: int | None = None, num_rows: int = 1
) -> Tensor:
    """Token ids (num_rows, length + 1) from different places of a text; the last is only predicted.

    length None: 64k tokens, or what there is. Raises ValueError as `text_ids`, and if the text is
    too short for the length.
    """
    if num_rows < 1:
        raise ValueError(f"rows={num_rows}, expected at least 1")
    wanted = (length or DEFAULT_LENGTH) + 1
    tokens = text_ids(text, tokenizer, wanted if num_rows == 1 else None)
    if length is None:
        wanted = min(wanted, len(tokens) // num_rows)
    elif num_rows * wanted > len(tokens):
        raise ValueError(
            f"the text has {len(tokens):,} tokens, fewer than {num_rows} x {length:,} + "
            f"{num_rows}; give a smaller length, or none to read what there is"
        )
    return rows_of(tokens, wanted, num_rows)


def rows_of(tokens: Tensor, length: int, num_rows: int) -> Tensor:
    """ids (num_rows, length) from different places of a text (N,), the first from its start.

    Raises ValueError if they do not fit side by side.
    """
    if num_rows * length > len(tokens):
        raise ValueError(
            f"{num_rows} rows of {length:,} tokens do not fit into a text of {len(tokens):,}"
        )
    stride = (len(tokens) - length) // max(1, num_rows - 1)
    return torch.stack([tokens[i * stride : i * stride + length] for i in range(num_rows)])


def two_texts(
    text: str | Path, other: str | Path | None, tokenizer: Any, length: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Token ids (num_rows, length + 1 or what there is) of two texts; other None: of two halves.

    Rows stand in the first 8 times the tokens that they hold; the rest is not read.
    """
    most = _SPREAD * num_rows * (length + 1)
    tokens = text_ids(text, tokenizer, most)
    if other is None:
        half = len(tokens) // 2
        parts = [tokens[:half], tokens[half:]]
    else:
        parts = [tokens, text_ids(other, tokenizer, most)]
    first, second = (rows_of(p, min(length + 1, len(p) // num_rows), num_rows) for p in parts)
    return first, second
