"""The baseline of every bound: the model as it is, on short contexts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from statewright import spec
from statewright.catalog import BOUNDS
from statewright.evaluation.losses import token_losses
from statewright.policies import Policy, build_policy, policy_spec


@dataclass(frozen=True)
class ShortContext:
    """The unbounded model on contexts of `length` tokens ("Baseline", arXiv:2401.06104, sec. 5.1).

    `context:length=512` where a policy's spec may stand. Losses: the text is cut into runs of
    `length` tokens and each is read from an empty context. Answers: the end of the prompt is read.
    """

    length: int = field(default=0, metadata={"least": 1})

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"context: length={self.length}, expected at least 1 token")


Bound = Policy | ShortContext | None


def build_bound(text: str | Bound) -> Bound:
    """A policy, "none", or the baseline `context:length=512`."""
    if isinstance(text, ShortContext):
        return text
    if isinstance(text, str) and spec.split(text)[0] == "context":
        return spec.build(text, BOUNDS, "policy")
    return build_policy(text)


def bound_spec(bound: Bound) -> str:
    """The string that builds it."""
    if isinstance(bound, ShortContext):
        return spec.format_spec("context", {"length": bound.length}, ShortContext)
    return policy_spec(bound)


def short_context_losses(
    model: PreTrainedModel, input_ids: Tensor, length: int, piece: int = 1024
) -> Tensor:
    """Losses (B, T - 1) as `token_losses`, each token seeing at most `length` before it.

    Token i follows i mod length + 1 tokens of context (i from 0, the first that is predicted), so
    every token but the first is scored exactly once, whatever the length: rows can be compared.
    """
    B, T = input_ids.shape
    runs = (T - 1) // length
    found = []
    if runs:
        rows = input_ids.unfold(1, length + 1, length).reshape(B * runs, length + 1)
        parts = rows.split(max(piece // length, 1))
        losses = [token_losses(model, part, "none", piece=piece) for part in parts]
        found.append(torch.cat(losses).view(B, runs * length))
    if runs * length < T - 1:
        found.append(token_losses(model, input_ids[:, runs * length :], "none", piece=piece))
    return torch.cat(found, 1)
