"""Which tokens a policy keeps, and for how long (arXiv:2401.06104, section 6 and appendix H)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewright.state import KVState
from statewright.token_text import token_labels


class Survivors:
    """Looks at the lists of a text's first row every `piece` tokens, and adds up."""

    def __init__(self, length: int, budget: int, piece: int) -> None:
        self.budget, self.piece = budget, piece
        self.looks = torch.zeros(length)
        self.now = torch.zeros(length)
        self.recent: list[float] = []
        self.seen = 0

    def look(self, states: Sequence[KVState | None]) -> None:
        """Call it whenever `piece` more tokens have been read (the last piece may be shorter)."""
        lists = [state for state in states if state is not None]
        self.seen = int(lists[0].seen[0])
        heads = [pos[pos >= 0] for state in lists for pos in state.pos[0].cpu()]
        kept = torch.cat(heads)
        self.now = torch.bincount(kept, minlength=len(self.looks)).float() / len(heads)
        self.looks += self.now
        if self.seen > self.budget:
            self.recent.append(float((kept >= self.seen - self.budget).double().mean()))

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Shares over all layers and key heads, and the mean survival of each class of tokens.

        recent: of the kept, how many are among the last `budget` tokens (mean over all looks).
        first, next_3, up_to_25: the share of lists that hold token 1, 2-4, 5-25 at the end.
        survival: tokens, to the piece, of those that came at least `budget` before the end.
        """
        old = torch.arange(len(self.looks)) < self.seen - self.budget
        survival = {}
        for name in sorted(set(classes)):
            chosen = old & torch.tensor([c == name for c in classes])
            if bool(chosen.any()):
                steps = float(self.looks[chosen].mean()) * self.piece
                survival[name] = [int(chosen.sum()), round(steps, 1)]
        return {
            "recent": round(sum(self.recent) / max(len(self.recent), 1), 4),
            "first": round(float(self.now[0]), 4),
            "next_3": round(float(self.now[1:4].mean()), 4),
            "up_to_25": round(float(self.now[4:25].mean()), 4),
            "mean_age": round(self._mean_age(), 1),
            "survival": survival,
        }

    def _mean_age(self) -> float:
        age = self.seen - 1 - torch.arange(len(self.now)).float()
        return float((age * self.now).sum() / self.now.sum().clamp(min=1e-9))


def classes_of(ids: Sequence[int] | Tensor, tokenizer: Any) -> list[str]:
    """newline, end (.!?), pause (,;:), quote, other mark, number, Name, word or rest of a word."""
    return [_class_of(label) for label in token_labels(tokenizer, ids)]


def _class_of(text: str) -> str:
    inside = text.strip()
    if "\n" in text:
        return "newline"
    if not inside:
        return "space"
    for name, marks in (("end", ".!?"), ("pause", ",;:"), ("quote", "\"'“”‘’")):
        if all(c in marks for c in inside):
            return name
    if not any(c.isalnum() for c in inside):
        return "other mark"
    if inside[0].isdigit():
        return "number"
    if inside[0].isupper():
        return "Name"
    return "word" if text[0] == " " else "rest of a word"
