"""One model, one task, one policy: a Result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from statewright.evaluate.curves import (
    Curve,
    bits_per_byte,
    loss_by_position,
    score_by_depth,
    standard_error,
)
from statewright.evaluate.losses import perplexity, token_losses
from statewright.evaluate.measure import Cost, metered
from statewright.evaluate.metrics import score
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM
from statewright.policies import build_policy
from statewright.spec import format_spec
from statewright.tasks import TASKS, Task, build_task
from statewright.tasks.base import IGNORED, Batch, Sample


@dataclass(frozen=True)
class Result:
    """What was asked, as spec strings, and what came out.

    per_sample: 1 or 0 for an answer that was right or wrong (the share of right ones, if a sample
    has several), the mean loss in nats of a window, or an answer's score; their mean is the first
    metric, `standard_error` its error. places: where the samples' answers were. texts: answers
    that were compared with references. truncated: samples and tokens that a task cut to its
    length. cost: see `Cost`.
    """

    task: str
    version: int
    policy: str
    n: int
    seed: int
    metrics: dict[str, float]
    per_sample: tuple[float, ...]
    places: tuple[float, ...]
    standard_error: float | None = None
    curves: tuple[Curve, ...] = ()
    texts: tuple[str, ...] = ()
    truncated: dict[str, int] = field(default_factory=dict)
    cost: Cost | None = None


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
    where the task knows it; a task with references is scored by its metric. `policy` may also be
    the baseline, `context:length=512`. Samples run one by one, so that no padding is involved.
    Raises ValueError for an unknown task, policy or option, a model that the policy cannot bound,
    and an input longer than a learned table of positions.
    """
    chosen = build_task(task) if isinstance(task, str) else task
    if n < 1:
        raise ValueError(f"evaluate: n={n}, expected at least 1 sample")
    batch = chosen.draw(n, seed, tokenizer)
    return evaluate_batch(model, tokenizer, chosen, batch, policy, seed, prefill)


@torch.no_grad()
def evaluate_batch(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    batch: Batch,
    policy: Bound | str = None,
    seed: int = 0,
    prefill: str = "exact",
) -> Result:
    """As `evaluate`, on samples that were drawn before with this seed."""
    check_positions(model, batch)
    found: dict[str, list] = {"values": [], "losses": [], "texts": []}
    with metered(model) as meter:
        for sample in batch.samples:
            kind, value = _answer(model, tokenizer, sample, batch.new_tokens, policy, prefill)
            found[kind].append(value)
            meter.look()
        cost = meter.cost(model.device)
    metrics, per_sample, curves = _summary(tokenizer, task, batch, found)
    cuts = [sample.cut for sample in batch.samples if sample.cut]
    return Result(
        spec_of(task),
        task.version,
        bound_spec(build_bound(policy)),
        len(batch.samples),
        seed,
        metrics,
        tuple(per_sample),
        tuple(sample.place for sample in batch.samples),
        standard_error(per_sample),
        curves,
        tuple(found["texts"]),
        {"samples": len(cuts), "tokens": sum(cuts)} if cuts else {},
        cost,
    )


def _answer(
    model: PreTrainedModel,
    tokenizer: Any,
    sample: Sample,
    new_tokens: int,
    policy: Bound | str,
    prefill: str,
) -> tuple[str, Any]:
    """("values", a score), ("losses", (T - 1,)) or ("texts", an answer to be scored later)."""
    ids = sample.input_ids.to(model.device).unsqueeze(0)
    if sample.targets is not None:
        return "values", _recalled(model, ids, sample.targets, policy, prefill)
    if not new_tokens:
        return "losses", _losses(model, ids, policy, prefill)[0].cpu()
    if sample.references:
        out = _continue(model, ids, new_tokens, policy, prefill, stop=True)
        return "texts", tokenizer.decode(out, skip_special_tokens=True).strip()
    text = tokenizer.decode(_continue(model, ids, new_tokens, policy, prefill))
    return "values", float(sample.answer in text)


def _summary(
    tokenizer: Any, task: Task, batch: Batch, found: dict[str, list]
) -> tuple[dict[str, float], Sequence[float], tuple[Curve, ...]]:
    """Metrics, a value per sample, and curves."""
    if losses := found["losses"]:
        values = [float(row.double().mean()) for row in losses]
        mean = math.fsum(values) / len(values)
        read = [tokenizer.decode(sample.input_ids[1:]) for sample in batch.samples]
        metrics = {"nats": mean, "perplexity": perplexity(torch.tensor(values))}
        metrics["bits_per_byte"] = bits_per_byte(losses, read)
        return metrics, values, (loss_by_position(losses),)
    if texts := found["texts"]:
        references = [sample.references for sample in batch.samples]
        scores = score(getattr(task, "metric", ""), texts, references)
        return scores.metrics, scores.per_sample, ()
    values = found["values"]
    metrics = {"accuracy": math.fsum(values) / len(values)}
    if (chance := getattr(task, "chance", None)) is not None:
        metrics["chance"] = chance
    places = [sample.place for sample in batch.samples]
    spread = len(set(places)) > 1
    return metrics, values, (score_by_depth(places, values, "accuracy"),) if spread else ()


def check_positions(model: PreTrainedModel, batch: Batch) -> None:
    """ValueError if a sample and its answer are longer than a learned table of positions.

    Rotary and recurrent models may be read beyond the length they were trained on.
    """
    longest = max(len(sample.input_ids) for sample in batch.samples) + batch.new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and ("pos" in name.rpartition(".")[2] or name.endswith("wpe"))
    )
    table = next(tables, None)
    if limit is not None and table is not None and longest > limit:
        raise ValueError(
            f"evaluate: {longest} tokens, answer included, but the model's table of positions "
            f"({table}) ends at {limit}"
        )


def _losses(model: PreTrainedModel, ids: Tensor, policy: Bound | str, prefill: str) -> Tensor:
    if isinstance(short := build_bound(policy), ShortContext):
        return short_context_losses(model, ids, short.length)
    return token_losses(model, ids, policy, prefill)


def _continue(
    model: PreTrainedModel,
    ids: Tensor,
    count: int,
    policy: Bound | str,
    prefill: str,
    stop: bool = False,
) -> Tensor:
    """Greedy new tokens (count,); fewer if it may `stop` at the end of the text."""
    if isinstance(short := build_bound(policy), ShortContext):
        return _continue(model, ids[:, -short.length :], count, "none", prefill, stop)
    options: dict[str, Any] = {"max_new_tokens": count}
    if not stop:
        options["min_new_tokens"] = count
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


def spec_of(task: Task) -> str:
    """The string that builds the task."""
    name = next((n for n, cls in TASKS.items() if cls is type(task)), None)
    if name is None:
        return repr(task)
    options = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    return format_spec(name, options, TASKS[name])
