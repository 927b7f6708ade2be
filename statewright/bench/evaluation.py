"""What `statewright eval` costs over the forward passes that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from statewright.bench.perplexity import llama
from statewright.bench.protocol import Case
from statewright.evaluation import evaluate_batch
from statewright.evaluation.answers import rows_of
from statewright.hf.arguments import CACHE
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.tasks import MQAR, Passkey
from statewright.tasks.base import IGNORED, Batch, Sample
from statewright.tasks.perplexity import Perplexity

FLOOR, OURS, SINGLE = "floor: plain batched passes", "ours", "ours, one by one"


def cases(quick: bool) -> Iterator[Case]:
    """Recall at targets, losses of windows and short answers, on small models."""
    rows = 8 if quick else 64
    for mixer in ("mingru", "mamba2:state_size=64:head_dim=32", "attention"):
        yield recall(mixer, rows)
    yield losses(2 if quick else 6, 2 if quick else 8)
    yield answers(2 if quick else 6, 2 if quick else 16)


def recall(mixer: str, rows: int) -> Case:
    """MQAR of 256 tokens on 4 layers of 256: one pass, scored at the targets."""
    config = StatewrightConfig(vocab_size=257, num_hidden_layers=4, mixer=mixer)
    model, task = _seeded(lambda: StatewrightForCausalLM(config)), MQAR(16, 256)
    batch = task.draw(rows, 0)
    ids = torch.stack([s.input_ids for s in batch.samples])
    targets = torch.stack([s.targets for s in batch.samples if s.targets is not None])
    scored = targets != IGNORED

    def plain() -> float:
        right = model(ids).logits.argmax(-1) == targets
        return float(right[scored].double().mean())

    name = f"evaluating {mixer.partition(':')[0]}, {rows} x {ids.shape[1]} tokens of MQAR"
    return _case(name, model, task, batch, plain, "accuracy")


def losses(layers: int, rows: int) -> Case:
    """Windows of 1,024 tokens on a Llama: a pass and its losses."""
    model, task = llama(layers, 8192), Perplexity()
    ids = torch.randint(model.config.vocab_size, (rows, 1024), generator=_generator())
    batch = Batch(tuple(Sample(row) for row in ids))

    def plain() -> float:
        found = []
        for part in ids.split(rows_of(model, 1024)):
            logits = model(part, use_cache=False).logits[:, :-1]
            found.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
        return float(torch.stack(found).mean())

    name = f"evaluating a Llama of {layers} x 576, {rows} x 1,024 tokens of text"
    return _case(name, model, task, batch, plain, "nats")


def answers(layers: int, rows: int) -> Case:
    """Passkeys in 512 bytes on a Llama: a prefill and five tokens, greedily."""
    model, task = llama(layers, 8192), Passkey(512)
    batch = task.draw(rows, 0, byte_tokenizer())
    ids = torch.stack([sample.input_ids for sample in batch.samples])

    def plain() -> float:
        for part in ids.split(rows_of(model, ids.shape[1] + 5)):
            cache = DynamicCache(config=model.config)
            out = model(part, logits_to_keep=1, **{CACHE: cache})
            for _ in range(4):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, **{CACHE: cache})
        return 0.0

    name = f"evaluating a Llama of {layers} x 576, {rows} passkeys of {ids.shape[1]} tokens"
    return _case(name, model, task, batch, plain, "accuracy")


def _case(
    name: str, model: Any, task: Any, batch: Batch, plain: Callable[[], float], metric: str
) -> Case:
    tokenizer = byte_tokenizer()

    def ours(rows: int) -> Callable[[], float]:
        return lambda: evaluate_batch(model, tokenizer, task, batch, rows=rows).metrics[metric]

    methods = {FLOOR: torch.no_grad()(plain), OURS: ours(0), SINGLE: ours(1)}
    error = abs(methods[OURS]() - methods[FLOOR]())
    return Case(name, FLOOR, methods, {OURS: error}, {OURS: 1e-5})


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
