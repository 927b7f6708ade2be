"""One model, one task, one policy: a Result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from statewright.evaluation.answers import Answer, Manner, answers, takes_padding
from statewright.evaluation.context import Bound, bound_spec, build_bound
from statewright.evaluation.curves import (
    Curve,
    bits_per_byte,
    loss_by_position,
    score_by_depth,
)
from statewright.evaluation.losses import perplexity
from statewright.evaluation.measure import Cost, metered
from statewright.evaluation.metrics import Scores, score
from statewright.evaluation.stories import story_scores
from statewright.intervals import SHARES, estimate
from statewright.models.any_model import opened, tokenizer_of
from statewright.spec import format_spec
from statewright.tasks import TASKS, Task, build_task
from statewright.tasks.base import Batch
from statewright.token_text import text_of


@dataclass(frozen=True)
class Result:
    """What was asked, as spec strings, and what came out.

    per_sample: 1 or 0 for an answer that was right or wrong (the share of right ones, if a sample
    has several), the mean loss in nats of a window, or an answer's score; their mean is the first
    metric, `interval` where it lies with 95 %. places: where the samples' answers were. texts:
    answers that were compared with references. truncated: samples and tokens that a task cut to its
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
    interval: tuple[float, float] | None = None
    curves: tuple[Curve, ...] = ()
    texts: tuple[str, ...] = ()
    truncated: dict[str, int] = field(default_factory=dict)
    cost: Cost | None = None


@torch.no_grad()
def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: Any,
    task: Task | str,
    policy: Bound | str = None,
    n: int = 200,
    seed: int = 0,
    prefill: str = "exact",
    rows: int = 1,
) -> Result:
    """Run a task: greedy answers (metric `accuracy`) or losses (`nats`, `perplexity`).

    model: ours, any causal LM of transformers, or a directory or id, whose own tokenizer is read if
    none is given. A task on token ids is scored at its targets; `chance` stands beside `accuracy`
    where the task knows it; a task with references is scored by its metric. `policy` may also be
    the baseline, `context:length=512`. rows: samples that share a call, padded only where they are
    written on from and the model can take it; 0 for as many as keep a call small. Raises
    ValueError for an unknown task, policy or option, a model that the policy cannot bound, and an
    input longer than a table of positions.

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> evaluate(model, None, "mqar", n=2).metrics.keys()
    dict_keys(['accuracy', 'chance'])
    """
    tokenizer = tokenizer_of(model, tokenizer)
    model = opened(model)
    chosen = build_task(task) if isinstance(task, str) else task
    if n < 1:
        raise ValueError(f"evaluate: n={n}, expected at least 1 sample")
    batch = chosen.draw(n, seed, tokenizer)
    return evaluate_batch(model, tokenizer, chosen, batch, policy, seed, prefill, rows)


@torch.no_grad()
def evaluate_batch(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    batch: Batch,
    policy: Bound | str = None,
    seed: int = 0,
    prefill: str = "exact",
    rows: int = 1,
) -> Result:
    """As `evaluate`, on samples that were drawn before with this seed."""
    if not batch.samples:
        raise ValueError(f"evaluate: {spec_of(task)} has no samples, expected at least 1")
    check_positions(model, batch)
    padded = rows != 1 and batch.new_tokens > 0 and takes_padding(model)
    manner = Manner(policy, prefill, rows, getattr(task, "temperature", 0.0), seed, padded)
    textual = bool(getattr(task, "metric", ""))
    with metered(model) as meter:
        found = answers(model, tokenizer, batch, manner, textual, meter.look)
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
        estimate(per_sample, next(iter(metrics)) in SHARES).interval,
        curves,
        tuple(answer.text for answer in found if answer.text is not None),
        {"samples": len(cuts), "tokens": sum(cuts)} if cuts else {},
        cost,
    )


def _summary(
    tokenizer: Any, task: Task, batch: Batch, found: Sequence[Answer]
) -> tuple[dict[str, float], Sequence[float], tuple[Curve, ...]]:
    """Metrics, a value per sample, and curves."""
    if losses := [answer.losses for answer in found if answer.losses is not None]:
        values = [float(row.double().mean()) for row in losses]
        mean = math.fsum(values) / len(values)
        read = [text_of(tokenizer, sample.input_ids[1:]) for sample in batch.samples]
        metrics = {"nats": mean, "perplexity": perplexity(torch.tensor(values))}
        metrics["bits_per_byte"] = bits_per_byte(losses, read)
        return metrics, values, (loss_by_position(losses),)
    if texts := [answer.text for answer in found if answer.text is not None]:
        scores = _scores(task, batch, texts, found)
        return {**scores.metrics, **_chance(task)}, scores.per_sample, ()
    values = [answer.value for answer in found if answer.value is not None]
    metrics = {"accuracy": math.fsum(values) / len(values), **_chance(task)}
    places = [sample.place for sample in batch.samples]
    spread = len(set(places)) > 1
    return metrics, values, (score_by_depth(places, values, "accuracy"),) if spread else ()


def _scores(task: Task, batch: Batch, texts: Sequence[str], found: Sequence[Answer]) -> Scores:
    metric = getattr(task, "metric", "")
    if metric == "story":
        return story_scores(texts, [answer.tokens for answer in found])
    return score(metric, texts, [sample.references for sample in batch.samples])


def _chance(task: Task) -> dict[str, float]:
    chance = getattr(task, "chance", None)
    return {} if chance is None else {"chance": chance}


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


def spec_of(task: Task) -> str:
    """The string that builds the task."""
    kind: Any = type(task)
    options = {f.name: getattr(task, f.name) for f in dataclasses.fields(kind)}
    return format_spec(TASKS.name_of(type(task)), options, type(task))
