"""One model, one task, one policy: a Result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from statewright.evaluate.context import (
    Bound,
    ShortContext,
    bound_spec,
    build_bound,
    short_context_losses,
)
from statewright.evaluate.losses import perplexity, token_losses
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM
from statewright.policies import build_policy
from statewright.spec import format_spec
from statewright.tasks import TASKS, Task, build_task
from statewright.tasks.base import IGNORED


@dataclass(frozen=True)
class Result:
    """What was asked, as spec strings, and what came out.

    per_sample: 1 or 0 for an answer that was right or wrong (the share of right ones, if a sample
    has several), or the mean loss in nats of a window;
    places: where the samples' answers were.
    """

    task: str
    version: int
    policy: str
    n: int
    seed: int
    metrics: dict[str, float]
    per_sample: tuple[float, ...]
    places: tuple[float, ...]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task | str,
    policy: Bound | str = None,
    n: int = 200,
    seed: int = 0,
    prefill: str = "exact",
) -> Result:
    """Run a task: greedy answers (metric `accuracy`) or losses (`nats`, `perplexity`).

    A task on token ids is scored at its targets, in one pass; `chance` stands beside `accuracy`
    where the task knows it. `policy` may also be the baseline, `context:length=512`. Samples run
    one by one, so that no padding is involved. Raises ValueError for an unknown task, policy or
    option, and a model that the policy cannot bound.
    """
    chosen = build_task(task) if isinstance(task, str) else task
    if n < 1:
        raise ValueError(f"evaluate: n={n}, expected at least 1 sample")
    batch = chosen.draw(n, seed, tokenizer)
    values = []
    for sample in batch.samples:
        ids = sample.input_ids.to(model.device).unsqueeze(0)
        if sample.targets is not None:
            values.append(_recalled(model, ids, sample.targets, policy, prefill))
        elif batch.new_tokens:
            text = tokenizer.decode(_continue(model, ids, batch.new_tokens, policy, prefill))
            values.append(float(sample.answer in text))
        else:
            values.append(float(_losses(model, ids, policy, prefill).double().mean()))
    mean = sum(values) / n
    metrics = {"accuracy": mean}
    if (chance := getattr(chosen, "chance", None)) is not None:
        metrics["chance"] = chance
    if not batch.new_tokens and batch.samples[0].targets is None:
        metrics = {"nats": mean, "perplexity": perplexity(torch.tensor(values))}
    places = tuple(sample.place for sample in batch.samples)
    bound = bound_spec(build_bound(policy))
    name = _spec_of(chosen)
    return Result(name, chosen.version, bound, n, seed, metrics, tuple(values), places)


def _losses(model: PreTrainedModel, ids: Tensor, policy: Bound | str, prefill: str) -> Tensor:
    if isinstance(short := build_bound(policy), ShortContext):
        return short_context_losses(model, ids, short.length)
    return token_losses(model, ids, policy, prefill)


def _continue(
    model: PreTrainedModel, ids: Tensor, count: int, policy: Bound | str, prefill: str
) -> Tensor:
    """Greedy new tokens (count,), without stopping early."""
    if isinstance(short := build_bound(policy), ShortContext):
        return _continue(model, ids[:, -short.length :], count, "none", prefill)
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
    if isinstance(model, StatewrightForCausalLM):
        options["policy"] = policy
    elif (chosen := build_policy(policy)) is not None:
        options["past_key_values"] = BoundedCache(model, chosen, prefill)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, **options)
    return out[0, ids.shape[1] :]


def _recalled(
    model: PreTrainedModel, ids: Tensor, targets: Tensor, policy: Bound | str, prefill: str
) -> float:
    """The share of targets (T,) that are the most likely next token of ids (1, T)."""
    if isinstance(build_bound(policy), ShortContext):
        raise ValueError(f"evaluate: policy={policy!r} cannot score a task at its targets")
    size = model.config.get_text_config().vocab_size
    if int(ids.max()) >= size or int(targets.max()) >= size:
        raise ValueError(f"evaluate: the task's token ids reach beyond the model's {size}")
    options: dict[str, Any] = {}
    if isinstance(model, StatewrightForCausalLM):
        options["policy"] = policy
    elif (chosen := build_policy(policy)) is not None:
        options["past_key_values"] = BoundedCache(model, chosen, prefill)
    logits = model(ids, **options).logits[0]
    scored = targets != IGNORED
    right = logits.argmax(-1).cpu()[scored] == targets[scored]
    return float(right.double().mean())


def _spec_of(task: Task) -> str:
    name = next((n for n, cls in TASKS.items() if cls is type(task)), None)
    if name is None:
        return repr(task)
    options = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    return format_spec(name, options, TASKS[name])
