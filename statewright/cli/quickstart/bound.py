"""Quickstart's step on bounded Transformers: the same text with less and less in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from statewright.cli.common import human_bytes
from statewright.cli.quickstart.screen import Screen

_LENGTH, _WINDOWS, _BUDGET = 512, 8, 32


def bound(screen: Screen, text: Path) -> dict[str, Any]:
    """Loss of `demo:transformer` on windows of 512 bytes under policies that keep 32 tokens.

    Returns, by policy, nats per byte, the paired difference from the full list with its 95 %
    interval, and bytes of state: about 10 s on one core.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from statewright.demos import locate
    from statewright.evaluation import evaluate
    from statewright.intervals import paired
    from statewright.models.tokenizers import saved_tokenizer

    place = locate("demo:transformer")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer, task = saved_tokenizer(place), f"perplexity:length={_LENGTH}:text={text}"
    bounds = ("context:length={}", "window:budget={}", "window:budget={}:sinks=4", "tova:budget={}")
    policies = ["none", *(bound.format(_BUDGET) for bound in bounds)]
    results = {p: evaluate(model, tokenizer, task, p, _WINDOWS, rows=0) for p in policies}
    full, found, rows = results["none"], {}, []
    for policy, result in results.items():
        apart = paired(result.per_sample, full.per_sample)
        size = result.cost.state_bytes
        found[policy] = {
            "nats": result.metrics["nats"],
            "difference": apart.mean,
            "interval": apart.interval,
            "per_window": result.per_sample,
            "bytes": size,
        }
        more = "" if policy == "none" else f"{apart.mean:+.3f} ± {apart.margin:.3f}"
        name = f"all {_LENGTH} tokens" if policy == "none" else policy
        rows.append([name, f"{result.metrics['nats']:.3f}", more, human_bytes(size)])
    screen.table(["memory", "nats per byte", "worse by", "state"], rows)
    screen.say(f"({rows[1][0]}: a model that never sees more than {_BUDGET} tokens at once)")
    return found
