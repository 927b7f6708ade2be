"""Token losses of any causal LM under a policy: exact, and in parallel over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM
from statewright.policies import Policy, build_policy


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy | str | None = None,
    prefill: str = "exact",
    piece: int = 1024,
) -> Tensor:
    """Cross-entropy in nats of every token but the first: input_ids (B, T) -> (B, T - 1), float32.

    With a policy each layer walks over the tokens and makes its choices one by one, as its
    own attention weights say, while everything else runs for `piece` tokens at once
    (arXiv:2401.06104, appendix E): the same survivors and losses as feeding one token at a time,
    whatever `piece` is. `prefill` as in BoundedCache, for transformers' models. policy None is
    the model as it is; a config's default policy of ours holds unless it is "none".
    """
    B, T = input_ids.shape
    if T < 2:
        raise ValueError(f"token_losses: input_ids is ({B}, {T}), expected at least 2 tokens")
    ours = isinstance(model, StatewrightForCausalLM)
    chosen = build_policy(policy)
    state, cache = None, None
    if not ours:
        cache = DynamicCache(config=model.config)
        cache = cache if chosen is None else BoundedCache(model, chosen, prefill)
    losses = []
    for begin in range(0, T - 1, piece):
        end = min(begin + piece, T - 1)
        ids = input_ids[:, begin:end]
        if ours:
            out = model(ids, state=state, policy=policy)
            state = out.state
        else:
            out = model(ids, past_key_values=cache, use_cache=True)
        logits, targets = out.logits.float(), input_ids[:, begin + 1 : end + 1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    return torch.cat(losses, 1)


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss over all tokens."""
    return float(losses.double().mean().exp())
