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


def matrix_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(log_a_t)) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t` (see `ops.matrix_scan`)."""
    dtype = state_dtype(*(t.dtype for t in (q, k, v, log_a, S0)))
    G, H = q.shape[2], v.shape[2]
    S, outputs = S0.to(dtype, copy=True), []
    steps = (t.to(dtype).unbind(1) for t in (q, k, v, log_a))
    resets = [None] * q.shape[1] if reset is None else reset.bool().unbind(1)
    for q_t, k_t, v_t, log_a_t, reset_t in zip(*steps, resets):
        if reset_t is not None:
            S = S.masked_fill(reset_t[:, None, None, None], 0)
        inserted = torch.einsum("bgk,bgrv->bgrkv", k_t, v_t.unflatten(1, (G, H // G)))
        S = log_a_t.exp().unsqueeze(-1) * S + inserted.flatten(1, 2)
        read = torch.einsum("bgk,bgrkv->bgrv", q_t, S.unflatten(1, (G, H // G)))
        outputs.append(read.flatten(1, 2))
    return torch.stack(outputs, 1).to(v.dtype), S
