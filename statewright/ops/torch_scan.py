"""The vector scan in plain torch: chunked, in the linear domain, for any device.

Products of decays stay products (they underflow to a correct 0); nothing is ever the difference
of two cumulative sums, so decays of exactly 0 and resets are exact and errors do not grow with T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from statewright.ops.ref import state_dtype

# Rows at least this wide (B * D elements) keep a CPU busy; below it the per-call overhead counts.
_WIDE = 4096


def vector_scan(
    log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.vector_scan`. Backward and double backward are the same scan, run in reverse."""
    dtype = state_dtype(log_a.dtype, b.dtype, h0.dtype)
    a = log_a.to(dtype).exp()
    if reset is not None:
        a = a.masked_fill(reset.bool().unsqueeze(-1), 0)
    h = _LinearScan.apply(a, b.to(dtype), h0.to(dtype))
    return h.to(b.dtype), h[:, -1].clone()


class _LinearScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t; its gradient is the reverse scan g_t = dh_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
        return _scan(a, b, h0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a, _, h0 = inputs
        ctx.save_for_backward(a, h0, output)

    @staticmethod
    def backward(ctx, dh: Tensor):
        a, h0, h = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()
        g = _LinearScan.apply(later.flip(1), dh.flip(1), torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0.unsqueeze(1), h[:, :-1]], 1)
        return g * before.conj(), g, a[:, 0].conj() * g[:, 0]


def _chunk_length(a: Tensor) -> int:
    """Tokens per chunk: all of them when a row is wide enough, else about sqrt(T)."""
    B, T, D = a.shape
    if a.device.type == "cpu" and B * D >= _WIDE:
        return T
    return max(1, 2 ** round(math.log2(T) / 2))


def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """Loop over the positions of a chunk, all chunks at once; then carry from chunk to chunk."""
    T = b.shape[1]
    C = _chunk_length(a)
    N = T // C
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    if N * C < T:
        tail = N * C
        head = _scan_whole(a[:, :tail], b[:, :tail], h0, out[:, :tail], C) if N else h0
        _scan_whole(a[:, tail:], b[:, tail:], head, out[:, tail:], T - tail)
    else:
        _scan_whole(a, b, h0, out, C)
    return out


def _scan_whole(a: Tensor, b: Tensor, h0: Tensor, out: Tensor, C: int) -> Tensor:
    """Scan T = N * C tokens into `out`; returns the last state. Chunks are an axis of size N."""
    a, b, h = (t.unflatten(1, (-1, C)) for t in (a, b, out))
    N = a.shape[1]
    if N == 1:
        h[:, 0, 0] = torch.addcmul(b[:, 0, 0], a[:, 0, 0], h0)
        for j in range(1, C):
            h[:, 0, j] = torch.addcmul(b[:, 0, j], a[:, 0, j], h[:, 0, j - 1])
        return h[:, 0, -1]
    decay = torch.empty_like(h)
    h[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
    for j in range(1, C):
        h[:, :, j] = torch.addcmul(b[:, :, j], a[:, :, j], h[:, :, j - 1])
        decay[:, :, j] = a[:, :, j] * decay[:, :, j - 1]
    carry = h0
    for n in range(N):
        h[:, n].addcmul_(decay[:, n], carry.unsqueeze(1))
        carry = h[:, n, -1]
    return carry
