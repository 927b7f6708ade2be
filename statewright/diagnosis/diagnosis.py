"""The whole examination of one model: four prompts, how far it remembers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from statewright.diagnosis.prompts import PROMPTS, prompt_ids, rows_of_text
from statewright.diagnosis.reading import Reading, read
from statewright.diagnosis.remembrance import Remembrance, remembrance
from statewright.diagnosis.schedule import Schedule, rows_at
from statewright.diagnosis.train_length import train_length_of
from statewright.diagnosis.verdict import Verdict, judge, words
from statewright.hf.host import as_host
from statewright.models.any_model import opened, tokenizer_of
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
    text: str | Path | Tensor,
    train_length: int | None = None,
    tokenizer: Any = None,
    prompts: Sequence[str] = ("text",),
    policy: Policy | str | None = None,
    name: str | None = None,
    progress: Progress = lambda prompt, tokens: None,
) -> Diagnosis:
    """Whether a recurrent model forgets too little, too much, or reads on for ever.

    model: ours, any causal LM of transformers, or a directory or id. text: the text itself, the
    Path of a file (its first 64k tokens are read), or ids (B, N). train_length, in tokens: None for
    the recorded one. tokenizer: None for the one saved with the model. prompts: others beside
    "text" (`prompts.PROMPTS`) are read as witnesses. `progress(prompt, tokens)` after every call.
    Raises ValueError for a text of less than two training lengths, an unknown prompt, a model
    without recurrent layers, a policy on a model that is not ours, and losses that are not finite.

    >>> shape = dict(hidden_size=8, num_hidden_layers=1, mixer="mamba2:head_dim=8")
    >>> model = StatewrightForCausalLM(StatewrightConfig(**shape))
    >>> found = diagnose(model, "to be or not to be " * 20, 16, byte_tokenizer())
    >>> found.text.reading.length, found.verdict.name
    (379, 'healthy')
    """
    for prompt in prompts:
        if prompt not in PROMPTS:
            raise ValueError(f"prompt {prompt!r}, expected one of {', '.join(PROMPTS)}")
    place = str(model) if isinstance(model, str | Path) else None
    if not isinstance(text, Tensor) or {*prompts} - {"text"}:
        tokenizer = tokenizer_of(model, tokenizer)
    ids = text if isinstance(text, Tensor) else rows_of_text(text, tokenizer)
    host = as_host(opened(model, probed=True)).eval()
    train_length = train_length_of(train_length, host.config, place)
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
        model=name or place or "model",
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
