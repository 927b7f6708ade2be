"""Passkeys to train on: rows with a key to recall, an easy start, and texts of several segments."""

from __future__ import annotations

from functools import lru_cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from statewright.models.tokenizers import END_OF_TEXT, byte_tokenizer
from statewright.studies.capacity_settings import TOKENS
from statewright.tasks.base import IGNORED, encode
from statewright.tasks.passkey import FILLER, NEEDLE, PREFIX, QUESTION

_PARTS = r" ?[A-Za-z]+| ?\d|\n|[^\sA-Za-z\d]"


@lru_cache
def tokenizer_of(tokens: str) -> PreTrainedTokenizerBase:
    """`bytes`, or `words`: one token per word, digit and sign of the passkey task, no others."""
    if tokens == "bytes":
        return byte_tokenizer()
    if tokens != "words":
        raise ValueError(f"tokens={tokens!r}, expected one of {', '.join(TOKENS)}")
    split = pre_tokenizers.Split(Regex(_PARTS), "isolated")
    digits = "".join(f" {n}{n}" for n in range(10))
    text = PREFIX + FILLER + NEEDLE.format(key=digits) + QUESTION
    words = sorted({part for part, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*words, END_OF_TEXT])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def answer_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a space and five digits."""
    return len(encode(tokenizer, " 00000"))


def least_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """The least power of two that has room for the task with a line and an answer."""
    parts = (PREFIX, FILLER, QUESTION, " 00000")
    return 1 << (sum(len(encode(tokenizer, part)) for part in parts) - 1).bit_length()


def passkey_rows(
    length: int,
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    repeated: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """ids and targets (count, length): texts of `Passkey` and their answers, which are scored.

    The needle stands in place of a line that is drawn from the seed, and says the key twice; every
    mention but the first can be known, and is scored. `repeated`: of the other lines, those that
    say it again, which makes an easy start.
    """
    generator = torch.Generator().manual_seed(seed)
    filler, end = encode(tokenizer, FILLER), tokenizer.eos_token_id
    begin, question = encode(tokenizer, PREFIX), encode(tokenizer, QUESTION)
    room = length - len(begin) - len(question) - answer_length(tokenizer)
    ids = torch.full((count, length), end)
    targets = torch.full((count, length), IGNORED)
    for row in range(count):
        key = f"{int(torch.randint(100_000, (), generator=generator)):05d}"
        needle = encode(tokenizer, NEEDLE.format(key=key))
        lines = room // max(len(filler), len(needle))
        said = torch.rand(lines, generator=generator) < repeated
        said[torch.randint(lines, (), generator=generator)] = True
        body = [token for again in said for token in (needle if again else filler)]
        answer = torch.tensor(encode(tokenizer, f" {key}"))
        text = torch.cat([torch.tensor([*begin, *body, *question]), answer])
        ids[row, : len(text) - 1] = text[:-1]
        for at in _mentions(text, answer)[1:]:
            to = at + len(answer)
            targets[row, at - 1 : to - 1] = text[at:to]
    return ids, targets


def _mentions(text: Tensor, answer: Tensor) -> list[int]:
    return (text.unfold(0, len(answer), 1) == answer).all(1).nonzero().flatten().tolist()


def long_rows(
    length: int, most: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, (count, S * length) with S of 0 to most - 1, and ids and targets of the rest.

    The texts of a step are (S + 1) * length tokens; the answer ends in the last `length` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    before = int(torch.randint(most, (), generator=generator)) * length
    ids, targets = passkey_rows(before + length, count, seed, tokenizer)
    return ids[:, :before], ids[:, before:], targets[:, before:]
