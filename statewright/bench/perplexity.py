"""Exact perplexity under a budget: all tokens of a layer at once, or token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from statewright.bench.protocol import Case, error_of
from statewright.evaluation import token_losses
from statewright.hf.arguments import CACHE
from statewright.hf.bounded import BoundedCache


def cases(quick: bool) -> Iterator[Case]:
    """TOVA and Window+4 at an eighth of the text."""
    layers, T = (2, 512) if quick else (4, 4096)
    for policy in ("tova:budget={}", "window:budget={}:sinks=4"):
        yield exact(policy.format(T // 8), layers, T)


def exact(policy: str, layers: int, T: int) -> Case:
    """Losses of one text of T tokens; the floor is the same model without a policy.

    The shape is SmolLM2-135M's with fewer layers and a small vocabulary: both ways do the same
    per layer, and the large head would only favour the one that computes it for many tokens.
    """
    model = _sharp(layers)
    ids = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))
    methods = {
        "floor: no policy": lambda: token_losses(model, ids),
        "ours": lambda: token_losses(model, ids, policy),
        "token by token": lambda: token_by_token(model, ids, policy),
    }
    # In float64, where no near-tie can flip a choice, and short, as it is only the gate.
    small, few = _sharp(2).double(), ids[:, : min(T, 160)]
    short = policy.replace(str(T // 8), "20")
    error = error_of(token_losses(small, few, short), token_by_token(small, few, short))
    name = f"exact perplexity, {policy}, {layers} layers of 576, {T} tokens"
    return Case(name, "floor: no policy", methods, {"ours": error}, {"ours": 1e-5})


@torch.no_grad()
def token_by_token(model: PreTrainedModel, ids: Tensor, policy: str) -> Tensor:
    """The definition: one call per token into a bounded cache."""
    cache, losses = BoundedCache(model, policy), []
    for t in range(ids.shape[1] - 1):
        logits = model(ids[:, t : t + 1], use_cache=True, **{CACHE: cache}).logits[:, -1]
        losses.append(F.cross_entropy(logits.float(), ids[:, t + 1], reduction="none"))
    return torch.stack(losses, 1)


def llama(layers: int, vocab_size: int) -> PreTrainedModel:
    """SmolLM2-135M's shape with fewer layers and a small vocabulary, random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _sharp(layers: int) -> PreTrainedModel:
    """With attention far from uniform, as in a trained model."""
    model = llama(layers, 512)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return model
