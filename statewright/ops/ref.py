"""The definitions: one token at a time, in any dtype. Everything else is compared with these."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def state_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return reduce(torch.promote_types, dtypes, torch.float32)


def vector_scan(
    log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(log_a_t) * h_{t-1} + b_t`, token by token (see `ops.vector_scan`)."""
    dtype = state_dtype(log_a.dtype, b.dtype, h0.dtype)
    h, outputs = h0.to(dtype, copy=True), []
    resets = [None] * b.shape[1] if reset is None else reset.bool().unsqueeze(-1).unbind(1)
    for log_a_t, b_t, reset_t in zip(log_a.to(dtype).unbind(1), b.to(dtype).unbind(1), resets):
        if reset_t is not None:
            h = h.masked_fill(reset_t, 0)
        h = log_a_t.exp() * h + b_t
        outputs.append(h)
    return torch.stack(outputs, 1).to(b.dtype), h
