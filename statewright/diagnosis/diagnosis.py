"""The whole examination of one model: four prompts, how far it remembers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.prompts import PROMPTS, prompt_ids
from statewright.diagnosis.reading import Reading, read
from statewright.diagnosis.remembrance import Remembrance, remembrance
from statewright.diagnosis.schedule import Schedule, rows_at
from statewright.diagnosis.verdict import Verdict, judge, words
from statewright.hf.host import as_host
from statewright.policies import Policy

Progress = Callable[[str, int], None]
_DIGITS = 6
_MOST_WINDOWS = 64


@dataclass(frozen=True)
class Examined:
    """One prompt: what was read, the verdict on it, and that in words."""

    prompt: str
    reading: Reading
    verdict: Verdict
    words: str


@dataclass(frozen=True)
class Diagnosis:
    """`text` decides; the other prompts are witnesses. policy: what the model was read under."""

    model: str
    parameters: int
    text: Examined
    others: tuple[Examined, ...]
    remembrance: tuple[Remembrance, ...]

    @property
    def verdict(self) -> Verdict:
        return self.text.verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, floats to six digits: what a report needs."""
        return _plain(asdict(self))


def diagnose(
    model: Any,
    ids: Tensor,
    train_length: int,
    tokenizer: Any = None,
    prompts: Sequence[str] = ("text",),
    policy: Policy | str | None = None,
    name: str = "model",
    progress: Progress = lambda prompt, tokens: None,
) -> Diagnosis:
    """Read ids (B, N) and as many tokens of each other prompt (`prompts.PROMPTS`), and judge.

    model: ours or any causal LM of transformers; train_length in tokens; tokenizer: for prompts
    other than "text". `progress(prompt, tokens)` after every call. Raises ValueError as `read`.
    """
    host = as_host(model).eval()
    for prompt in prompts:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt {prompt!r}, expected one of {', '.join(PROMPTS)}")
    reading = _read(host, ids, train_length, policy, "text", progress)
    schedule = Schedule(reading.length, train_length)
    starts = schedule.first_windows()[:_MOST_WINDOWS]
    remembered = remembrance(host, rows_at(ids, starts, train_length), policy)
    others = []
    for prompt in prompts:
        if prompt != "text":
            size = host.config.get_text_config(decoder=True).vocab_size
            other = prompt_ids(prompt, ids.shape[1], tokenizer, size)
            found = _read(host, other, train_length, policy, prompt, progress)
            others.append(_examined(prompt, found, ()))
    return Diagnosis(
        model=name,
        parameters=sum(p.numel() for p in host.parameters()),
        text=_examined("text", reading, remembered),
        others=tuple(others),
        remembrance=remembered,
    )


def _read(
    host: Any,
    ids: Tensor,
    train_length: int,
    policy: Policy | str | None,
    prompt: str,
    progress: Progress,
) -> Reading:
    try:
        return read(host, ids, train_length, policy, lambda tokens: progress(prompt, tokens))
    except ValueError as error:
        if prompt == "text":
            raise
        raise ValueError(f"prompt {prompt}: {error}") from error


def _examined(prompt: str, reading: Reading, remembered: tuple[Remembrance, ...]) -> Examined:
    verdict = judge(reading, remembered)
    return Examined(prompt, reading, verdict, words(reading, verdict))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{_DIGITS}g}")
    return value


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
