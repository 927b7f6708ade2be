"""Held-out loss with the state carried from piece to piece, in flat memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from statewright.train.data import IGNORED, Corpus, stretches

_MAX_ROWS = 16


@dataclass(frozen=True)
class HeldOut:
    """Mean loss in nats per token, bits per byte of text, and how many tokens were scored."""

    nats: float
    bits_per_byte: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700.0))


@torch.no_grad()
def held_out(
    model: torch.nn.Module, corpus: Corpus, length: int = 256, policy: str = "none"
) -> HeldOut:
    """Score a whole corpus: a few long stretches side by side, each from a fresh state.

    policy: bounds the state as everywhere; "none" leaves that to the model's config.
    """
    options = {} if policy == "none" else {"policy": policy}
    rows = max(1, min(_MAX_ROWS, corpus.num_tokens // (8 * length)))
    was_training, state, total, count = model.training, None, 0.0, 0
    model.eval()
    for batch in stretches(corpus, rows, length):
        batch = batch.to(model.device)
        out = model(batch.ids, state=state, reset=batch.reset, **options)
        state, labels = out.state, batch.labels
        logits = out.logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        total += losses.item()
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    nats = total / max(1, count)
    tokens_per_byte = corpus.num_tokens / max(1, corpus.num_bytes)
    return HeldOut(nats, nats * tokens_per_byte / math.log(2), count)
