"""Token losses of any causal LM under a policy: exact, and in parallel over tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from statewright.hf.arguments import by_name, cache_argument
from statewright.hf.bounded import BoundedCache
from statewright.models import StatewrightForCausalLM
from statewright.policies import Policy, build_policy


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
    if isinstance(model, StatewrightForCausalLM):
        return torch.cat(list(_own_losses(model, input_ids, policy, piece)), 1)
    chosen = build_policy(policy)
    cache = DynamicCache(config=model.config)
    cache = cache if chosen is None else BoundedCache(model, chosen, prefill)
    return torch.cat(list(losses_into(model, input_ids, cache, piece)), 1)


@torch.no_grad()
def losses_into(
    model: PreTrainedModel, input_ids: Tensor, cache: Cache, piece: int = 1024
) -> Iterator[Tensor]:
    """As `token_losses`, piece by piece, of a transformers model into a cache of the caller's.

    The cache may be looked at between the pieces: what it holds then, it would hold token by token.
    """
    given = {cache_argument(model): cache, "use_cache": True, **by_name(model)}
    for begin, end in _pieces(input_ids, piece):
        out = model(input_ids[:, begin:end], **given)
        yield nats(out.logits, input_ids[:, begin + 1 : end + 1])


@torch.no_grad()
def _own_losses(
    model: StatewrightForCausalLM, input_ids: Tensor, policy: Policy | str | None, piece: int
) -> Iterator[Tensor]:
    state = None
    for begin, end in _pieces(input_ids, piece):
        out = model(input_ids[:, begin:end], state=state, policy=policy, **by_name(model))
        state = out.state
        yield nats(out.logits, input_ids[:, begin + 1 : end + 1])


def _pieces(input_ids: Tensor, piece: int) -> Iterator[tuple[int, int]]:
    B, T = input_ids.shape
    if T < 2:
        raise ValueError(f"token_losses: input_ids is ({B}, {T}), expected at least 2 tokens")
    for begin in range(0, T - 1, piece):
        yield begin, min(begin + piece, T - 1)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token: logits (B, T, vocabulary), targets (B, T) -> (B, T) float32."""
    # Flat: with the classes in the middle torch is 8 times slower.
    targets = targets.to(logits.device, torch.long)
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss over all tokens."""
    return float(losses.double().mean().exp())
