"""Four texts to read: the user's own, and three that need none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewright.tasks.base import encode
from statewright.tasks.passkey import FILLER, NEEDLE, PREFIX
from statewright.text_file import read_text
from statewright.train.data import encode as encode_pieces

PROMPTS = ("text", "newlines", "random", "passkey")


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


def text_ids(path: str | Path, tokenizer: Any, most: int | None = None) -> Tensor:
    """The file's tokens (N,) int32, at most `most` of them; a longer file is not read further.

    Raises ValueError if the file is missing, empty or no text.
    """
    parts, count = [], 0
    for ids in encode_pieces(read_text(path), tokenizer):
        parts.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if most is not None and count >= most:
            break
    return torch.cat(parts)[:most]
