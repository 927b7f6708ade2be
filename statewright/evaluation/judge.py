"""A pairwise judge: any causal LM says which of two texts is better, in both orders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from statewright.intervals import estimate
from statewright.tasks.base import encode

LETTERS = ("A", "B", "C")
BEFORE = "Two writers were given the same task. Here are the task and both answers.\n\nTask:\n"
FIRST = "\n\nAnswer (A):\n"
SECOND = "\n\nAnswer (B):\n"
QUESTION = (
    "\n\nWhich answer is the better story: (A), (B), or (C), both are equally good? "
    "Reply with one letter."
)
REPLY = "The better answer is ("


@dataclass(frozen=True)
class Verdicts:
    """Of n pairs, candidate against reference, each shown in both orders.

    per_sample: 1 for a win, 0 for a loss, 1/2 for a tie; a win is a preference in both orders
    (arXiv:2401.06104, section 5.3). win_rate: their mean; interval: where it lies with 95 %.
    identical: ties that were not shown, as both texts are the same. preference: the mean over
    orders of the probability of the candidate's letter among A and B, in which a constant liking
    for a letter cancels to first order; preference_interval: of 95 %. letters: the share of
    verdicts for A, B and C. position_bias: share of A less share of B, 0 for a judge that ignores
    the order. cut: tokens of the texts that did not fit.
    """

    n: int
    wins: int
    ties: int
    losses: int
    identical: int
    win_rate: float
    interval: tuple[float, float] | None
    preference: float
    preference_interval: tuple[float, float] | None
    letters: dict[str, float]
    position_bias: float
    cut: int
    per_sample: tuple[float, ...]


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    references: Sequence[str],
    length: int = 4096,
) -> Verdicts:
    """Compare texts[i] with references[i], both written for prompts[i].

    The verdict is the letter that the model finds most likely: nothing is sampled or parsed. A
    prompt has at most `length` tokens: the ends of both texts are cut alike, and counted. A chat
    template is used if the tokenizer has one. Raises ValueError for lists of different lengths or
    empty ones, a length without room for texts, and letters that are no tokens of their own.
    """
    if not len(prompts) == len(texts) == len(references) or not texts:
        raise ValueError(
            f"judge: {len(prompts)} prompts, {len(texts)} texts and {len(references)} references, "
            "expected as many, at least 1"
        )
    ids = _letter_ids(tokenizer)
    shown: list[tuple[Tensor, Tensor] | None] = []
    cut = 0
    for prompt, text, reference in zip(prompts, texts, references):
        if text == reference:
            shown.append(None)
            continue
        pair, lost = _pair(tokenizer, prompt, text, reference, length)
        cut += lost
        there, back = (_likelihoods(model, p, ids) for p in pair)
        shown.append((there, back))
    return _verdicts(shown, cut)


def _verdicts(shown: Sequence[tuple[Tensor, Tensor] | None], cut: int) -> Verdicts:
    """Each entry: log-likelihoods of A, B, C with the candidate as A, and as B; None: identical."""
    values, preferences, counts = [], [], [0, 0, 0]
    for pair in shown:
        if pair is None:
            values.append(0.5)
            preferences.append(0.5)
            continue
        there, back = pair
        letters = int(there.argmax()), int(back.argmax())
        for letter in letters:
            counts[letter] += 1
        values.append({(0, 1): 1.0, (1, 0): 0.0}.get(letters, 0.5))
        own = there[:2].softmax(0)[0] + back[:2].softmax(0)[1]
        preferences.append(float(own) / 2)
    n, calls = len(values), sum(counts)
    rate, preference = estimate(values, shares=True), estimate(preferences, shares=True)
    shares = {name: count / calls if calls else 0.0 for name, count in zip(LETTERS, counts)}
    return Verdicts(
        n,
        values.count(1.0),
        values.count(0.5),
        values.count(0.0),
        sum(pair is None for pair in shown),
        rate.mean,
        rate.interval,
        preference.mean,
        preference.interval,
        shares,
        shares["A"] - shares["B"],
        cut,
        tuple(values),
    )


def _letter_ids(tokenizer: Any) -> list[int]:
    found = [encode(tokenizer, letter) for letter in LETTERS]
    if any(len(ids) != 1 for ids in found) or len({ids[0] for ids in found}) < len(LETTERS):
        raise ValueError("judge: the tokenizer has no single tokens for A, B and C")
    return [ids[0] for ids in found]


def _pair(
    tokenizer: Any, prompt: str, text: str, reference: str, length: int
) -> tuple[list[Tensor], int]:
    """Token ids with the text first, and with the reference first; tokens lost of both texts."""
    head, middle, tail = (encode(tokenizer, part) for part in _frame(tokenizer, prompt))
    room = (length - len(head) - len(middle) - len(tail)) // 2
    if room < 1:
        raise ValueError(
            f"judge: length={length}, expected at least {length - 2 * room + 2} tokens for the "
            "task, the question and two texts"
        )
    both = [encode(tokenizer, part) for part in (text, reference)]
    kept = [part[:room] for part in both]
    lost = sum(len(a) - len(b) for a, b in zip(both, kept))
    orders = [kept, kept[::-1]]
    return [torch.tensor([*head, *a, *middle, *b, *tail]) for a, b in orders], lost


def _frame(tokenizer: Any, prompt: str) -> tuple[str, str, str]:
    """What stands before, between and after the two texts."""
    task = prompt.strip().replace("\0", "")
    whole = f"{BEFORE}{task}{FIRST}\0{SECOND}\0{QUESTION}"
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": whole}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        whole += "\n\n"
    head, middle, tail = (whole + REPLY).split("\0")
    return head, middle, tail


def _likelihoods(model: PreTrainedModel, ids: Tensor, letters: Sequence[int]) -> Tensor:
    """log p of each letter as the next token, (3,) float64."""
    known = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    logits = model(ids.unsqueeze(0).to(model.device), **options).logits[0, -1]
    return logits.double().log_softmax(-1)[list(letters)].cpu()
