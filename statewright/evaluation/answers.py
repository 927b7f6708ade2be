"""What a model answers to a task's samples under a policy, several samples at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from statewright.evaluation.context import Bound, ShortContext, build_bound, short_context_losses
from statewright.evaluation.losses import token_losses
from statewright.evaluation.measure import footprint
from statewright.hf.arguments import CACHE, by_name
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM
from statewright.policies import build_policy
from statewright.tasks.base import IGNORED, Batch, Sample
from statewright.token_text import holds, text_of

# What one call of a model may hold when the number of rows is up to us.
_MOST_TOKENS, _MOST_LOGITS = 1 << 14, 1 << 26


@dataclass(frozen=True)
class Manner:
    """How samples are put to a model. rows: samples per call, 0 for as many as keep a call small;
    temperature 0 is greedy; seed: of what is sampled; padded: prompts of different lengths may
    share a call (see `takes_padding`)."""

    policy: Bound | str = None
    prefill: str = "exact"
    rows: int = 1
    temperature: float = 0.0
    seed: int = 0
    padded: bool = False


@dataclass(frozen=True)
class Answer:
    """One of: a score; losses (T - 1,); a text and its number of tokens."""

    value: float | None = None
    losses: Tensor | None = None
    text: str | None = None
    tokens: int = 0


def answers(
    model: PreTrainedModel,
    tokenizer: Any,
    batch: Batch,
    manner: Manner,
    textual: bool = False,
    after: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One Answer per sample, in order; `after` is called after every group of samples.

    Samples of one length go together, and if the manner is padded, prompts that are written on
    from, on the left. textual: the continuation itself is the answer. Raises ValueError for a
    negative number of rows, and for what a model or a policy refuses.
    """
    if manner.rows < 0:
        raise ValueError(f"rows={manner.rows}, expected a number of samples, or 0")
    found: dict[int, Answer] = {}
    for group in _groups(model, batch, manner):
        samples = [batch.samples[i] for i in group]
        if samples[0].targets is None and batch.new_tokens:
            new = _continue(model, batch, manner, group, textual or bool(samples[0].references))
            found |= zip(group, _written(model, tokenizer, samples, new, textual))
        else:
            found |= zip(group, _scored(model, samples, manner))
        after()
    return [found[i] for i in range(len(batch.samples))]


def _groups(model: PreTrainedModel, batch: Batch, manner: Manner) -> Iterator[list[int]]:
    """Samples that share a call, at most `rows`; those that are padded in order of length."""
    samples = batch.samples
    alike: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        written = bool(batch.new_tokens) and sample.targets is None
        length = 0 if written and manner.padded else len(sample.input_ids)
        alike.setdefault((length, written, bool(sample.references)), []).append(i)
    for (_, written, _), members in alike.items():
        members = sorted(members, key=lambda i: len(samples[i].input_ids))
        longest = len(samples[members[-1]].input_ids)
        most = _MOST_TOKENS // (longest + batch.new_tokens) if written else rows_of(model, longest)
        rows = manner.rows or max(1, most)
        for begin in range(0, len(members), rows):
            yield members[begin : begin + rows]


def rows_of(model: PreTrainedModel, length: int) -> int:
    """How many samples of so many tokens are scored in one call if that is up to us."""
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(_MOST_TOKENS, _MOST_LOGITS // vocabulary) // length)


@torch.no_grad()
def takes_padding(model: PreTrainedModel) -> bool:
    """Ours, or a model whose state is a list of tokens and nothing else: measured.

    Recurrent models of others are wrong under padding.
    """
    if isinstance(model, StatewrightForCausalLM):
        return True
    if not isinstance(model, PreTrainedModel):
        return False
    has = footprint(model)
    return has.fixed == 0 and has.per_token > 0


def _scored(model: PreTrainedModel, samples: Sequence[Sample], manner: Manner) -> Iterator[Answer]:
    ids = torch.stack([sample.input_ids for sample in samples]).to(model.device)
    if samples[0].targets is None:
        yield from (Answer(losses=row.cpu()) for row in _losses(model, ids, manner))
        return
    targets = torch.stack([s.targets for s in samples if s.targets is not None])
    yield from (Answer(value) for value in _recalled(model, ids, targets, manner))


def _written(
    model: PreTrainedModel, tokenizer: Any, samples: Sequence[Sample], new: Tensor, textual: bool
) -> Iterator[Answer]:
    """new (B, T): whether the answer is in it, or the text up to its end."""
    for sample, row in zip(samples, new):
        if not (textual or sample.references):
            yield Answer(float(holds(tokenizer, row, sample.answer)))
            continue
        ended = until_end(row, _ends(model))
        text = text_of(tokenizer, ended, skip_special_tokens=True).strip()
        yield Answer(text=text, tokens=len(ended))


def _ends(model: PreTrainedModel) -> set[int]:
    """The ids that end a text."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def until_end(row: Tensor, ends: set[int]) -> Tensor:
    """The tokens (T,) before the first that ends a text."""
    at = next((i for i, token in enumerate(row.tolist()) if token in ends), len(row))
    return row[:at]


def _losses(model: PreTrainedModel, ids: Tensor, manner: Manner) -> Tensor:
    if isinstance(short := build_bound(manner.policy), ShortContext):
        return short_context_losses(model, ids, short.length)
    return token_losses(model, ids, manner.policy, manner.prefill)


def _continue(
    model: PreTrainedModel, batch: Batch, manner: Manner, group: Sequence[int], stop: bool
) -> Tensor:
    """New tokens (B, at most new_tokens): all of them unless a row may `stop` at its end."""
    rows, policy = [batch.samples[i].input_ids for i in group], manner.policy
    if isinstance(short := build_bound(policy), ShortContext):
        rows, policy = [row[-short.length :] for row in rows], "none"
    ids = _left_padded(rows, 0).to(model.device)
    mask = _left_padded([torch.ones_like(row) for row in rows], 0).to(model.device)
    options: dict[str, Any] = {"max_new_tokens": batch.new_tokens}
    if not stop:
        options["min_new_tokens"] = batch.new_tokens
    if manner.temperature:
        # A seed per sample: what is drawn does not depend on which samples share a call.
        seeds = [manner.seed * 1_000_003 + i for i in group]
        options["logits_processor"] = LogitsProcessorList([_Draw(manner.temperature, seeds)])
    options |= call_options(model, policy, manner.prefill)
    out = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, **options)
    return out[:, ids.shape[1] :]


def _left_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (longest - len(row), 0), value=value) for row in rows])


class _Draw(LogitsProcessor):
    """Greedy decoding of logits / temperature + Gumbel noise is sampling, from a seed per row."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        noise = torch.stack(
            [-torch.empty(size).exponential_(generator=g).log() for g in self.generators]
        )
        return scores.float() / self.temperature + noise.to(scores.device)


def call_options(model: PreTrainedModel, policy: Bound | str, prefill: str) -> dict[str, Any]:
    """What puts a call, or `generate`, under a policy."""
    if isinstance(model, StatewrightForCausalLM):
        return {"policy": policy}
    chosen = build_policy(policy)
    return {} if chosen is None else {CACHE: BoundedCache(model, chosen, prefill)}


def _recalled(model: PreTrainedModel, ids: Tensor, targets: Tensor, manner: Manner) -> list[float]:
    """Of each row of ids (B, T): the share of its targets that are the most likely next token."""
    if isinstance(build_bound(manner.policy), ShortContext):
        raise ValueError(f"evaluate: policy={manner.policy!r} cannot score a task at its targets")
    size = model.config.get_text_config().vocab_size
    if int(ids.max()) >= size or int(targets.max()) >= size:
        raise ValueError(f"evaluate: the task's token ids reach beyond the model's {size}")
    options = call_options(model, manner.policy, manner.prefill) | by_name(model)
    logits = model(ids, **options).logits
    scored = targets != IGNORED
    right = (logits.argmax(-1).cpu() == targets) & scored
    return (right.sum(1).double() / scored.sum(1)).tolist()
