"""A case for every verdict, built so that the truth is known: what `judge` is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.controls import Control, saved_control, scale_decay
from statewright.diagnosis.verdict import AMNESIA, COLLAPSE, HEALTHY, SHIFT, VERDICTS
from statewright.train.data import Corpus

Listener = Callable[[str, int, float], None]
FASTER_DECAY = 300.0
_DIGITS = b"0123456789abcdef"


@dataclass(frozen=True, eq=False)
class Case:
    """A model and a text, and what is wrong with them."""

    truth: str
    model: Any
    ids: Tensor


def cases(
    control: Control,
    corpus: Corpus,
    ids: Tensor,
    directory: str | Path,
    listen: Listener = lambda name, step, loss: None,
) -> Iterator[Case]:
    """The four, on ids (B, N) of bytes; the two models are trained once and kept in `directory`.

    collapse: an initialisation that keeps everything (`control`'s); healthy: the official one;
    amnesia: the healthy model, its decays 300 times as fast; shift: the healthy model on a text
    that turns into random hexadecimal digits at a quarter. `listen(model, step, loss)`.
    """

    def trained(name: str, which: Control) -> Any:
        return saved_control(
            which, corpus, Path(directory) / name, lambda step, loss: listen(name, step, loss)
        )

    yield Case(COLLAPSE, trained(f"low-decay-{control.seed}", control), ids)
    healthy = trained(f"official-{control.seed}", replace(control, decay_scale=1.0))
    yield Case(HEALTHY, healthy, ids)
    yield Case(AMNESIA, scale_decay(healthy, FASTER_DECAY), ids)
    yield Case(SHIFT, healthy, into_digits(ids, ids.shape[1] // 4, control.seed))


def into_digits(ids: Tensor, at: int, seed: int = 0) -> Tensor:
    """A copy of a text of bytes that goes on, from token `at`, in random hexadecimal digits."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.tensor(list(_DIGITS), dtype=ids.dtype)
    drawn = torch.randint(len(digits), (ids.shape[0], ids.shape[1] - at), generator=generator)
    return torch.cat([ids[:, :at], digits[drawn]], 1)


def confusion(pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Counts of (truth, verdict) pairs: a row per truth, a column per verdict, as in VERDICTS."""
    return [[pairs.count((truth, given)) for given in VERDICTS] for truth in VERDICTS]
