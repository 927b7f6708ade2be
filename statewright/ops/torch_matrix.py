"""The matrix scan in plain torch: chunked, all in matrix products, for any device.

Inside a chunk, token i reads token j <= i through exp(sum of log-decays in between), a difference
of two sums over at most one chunk, in the state's dtype; between chunks only states travel. Such
a difference never leaves [-inf, 0], so nothing overflows. Decays of (almost) exactly 0 and resets
cut the chunk into segments instead of entering the sums, which they would spoil.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.ops import torch_scan
from statewright.ops.ref import state_dtype

# A decay below exp(-50) = 2e-22 forgets everything, in any dtype.
_FORGETS = -50.0
_CHUNK, _SHORT_CHUNK = 64, 16
# exp(60) still leaves float32 a factor of 1e12 before it overflows.
_FACTORS = -60.0


def matrix_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.matrix_scan`. Groups are an axis of the products and never expanded."""
    dtype = state_dtype(*(t.dtype for t in (q, k, v, log_a, S0)))
    out_dtype, T = v.dtype, v.shape[1]
    q, k, v, log_a, S0 = (t.to(dtype) for t in (q, k, v, log_a, S0))
    if v.shape[-1] == 1 and log_a.shape[-1] > 1:
        o, S = _as_vector_scan(q, k, v, log_a, S0, reset)
        return o.to(out_dtype), S
    ends = _segment_ends(log_a, reset)
    if ends is not None:
        log_a = log_a.masked_fill(ends, 0)
    scan, C = _per_head, _CHUNK
    if log_a.shape[-1] > 1:
        scan, C = _per_key_plan(log_a, ends)
    C = min(T, C)
    padded = [_chunks(t, C) for t in (q, k, v, log_a)]
    segment = None if ends is None else _chunks(ends, C).cumsum(2)
    o, S = scan(*padded, S0, segment)
    return o.flatten(1, 2)[:, :T].to(out_dtype), S


def _segment_ends(log_a: Tensor, reset: Tensor | None) -> Tensor | None:
    """Where the past is cut off, (B, T, H, K|1) bool; None if nowhere."""
    ends = log_a < _FORGETS
    if reset is not None:
        return ends | reset.bool()[:, :, None, None]
    return ends if torch.compiler.is_compiling() or bool(ends.any()) else None


def _per_key_plan(log_a: Tensor, ends: Tensor | None) -> tuple[Callable, int]:
    """How to sum scores over keys, and the chunk length: products of factors where they fit."""
    if ends is None and not torch.compiler.is_compiling():
        for C in (_CHUNK, _SHORT_CHUNK):
            if _chunks(log_a.detach().clamp(max=0), C).sum(2).min() > _FACTORS:
                return partial(_per_key, factored=True), C
    return partial(_per_key, factored=False), _SHORT_CHUNK


def _chunks(t: Tensor, C: int) -> Tensor:
    """(B, T, ...) -> (B, chunks, C, ...), padded with zeros: decay 1, nothing written."""
    missing = -t.shape[1] % C
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, C))


def _masked_exp(difference: Tensor, keep: Tensor) -> Tensor:
    """exp where `keep`, 0 elsewhere, without a gradient through what is dropped."""
    return difference.masked_fill(~keep, -torch.inf).exp()


def _per_head(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One decay per head: (C, C) score matrices once per group, one decay matrix per head.

    q, k (B, N, C, G, K); v (B, N, C, H, V); log_a (B, N, C, H, 1); S0 (B, H, K, V).
    """
    B, N, C, G, K = q.shape
    H, V = v.shape[-2:]
    R = H // G
    sums = log_a.squeeze(-1).cumsum(2).movedim(3, 2)  # (B, N, H, C)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    keep, first, last = causal, None, None
    if segment is not None:
        segment = segment.squeeze(-1).movedim(3, 2)
        keep = causal & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
        first, last = segment == 0, segment == segment[..., -1:]
    between = _masked_exp(sums.unsqueeze(-1) - sums.unsqueeze(-2), keep)  # (B, N, H, C, C)
    q, k = q.movedim(3, 2), k.movedim(3, 2)  # (B, N, G, C, K)
    scores = (q @ k.mT).unsqueeze(3)  # (B, N, G, 1, C, C)
    heads = v.movedim(3, 2).unflatten(2, (G, R))  # (B, N, G, R, C, V)
    inside = (scores * between.unflatten(2, (G, R))) @ heads
    from_start, to_end = sums.exp(), (sums[..., -1:] - sums).exp()
    if first is not None:
        from_start, to_end = from_start * first, to_end * last
    written = heads * to_end.unflatten(2, (G, R)).unsqueeze(-1)
    written = k.mT @ written.movedim(3, 4).flatten(4)  # (B, N, G, K, R V)
    decay = from_start[..., -1].unflatten(2, (G, R))[:, :, :, None, :, None]
    before, S = _carry(S0.unflatten(1, (G, R)).movedim(2, 3), decay, written.unflatten(4, (R, V)))
    read = (q @ before.flatten(4)).unflatten(4, (R, V)).movedim(4, 3)  # (B, N, G, R, C, V)
    o = inside + read * from_start.unflatten(2, (G, R)).unsqueeze(-1)
    return o.flatten(2, 3).movedim(2, 3), S.movedim(2, 3).flatten(1, 2)


def _per_key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    S0: Tensor,
    segment: Tensor | None,
    factored: bool,
) -> tuple[Tensor, Tensor]:
    """One decay per head and key; shapes as in `_per_head`, log_a (B, N, C, H, K).

    `factored`: exp(s_i - s_j) as exp(s_i) exp(-s_j), for sums s that the caller found small
    enough; otherwise pair by pair in short chunks, which never overflows.
    """
    C, G = q.shape[2:4]
    H = v.shape[3]
    R = H // G
    sums = log_a.cumsum(2).movedim(3, 2).unflatten(2, (G, R))  # (B, N, G, R, C, K)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    keep, first, last = causal.unsqueeze(-1), None, None
    if segment is not None:
        segment = segment.expand(*segment.shape[:3], H, log_a.shape[-1])
        segment = segment.movedim(3, 2).unflatten(2, (G, R))
        keep = keep & (segment.unsqueeze(-2) == segment.unsqueeze(-3))
        first, last = segment == 0, segment == segment[..., -1:, :]
    q, k = q.movedim(3, 2).unsqueeze(3), k.movedim(3, 2).unsqueeze(3)  # (B, N, G, 1, C, K)
    heads = v.movedim(3, 2).unflatten(2, (G, R))
    from_start, to_end = sums.exp(), (sums[..., -1:, :] - sums).exp()
    if factored:
        scores = ((q * from_start) @ (k * (-sums).exp()).mT).masked_fill(~causal, 0)
    else:
        between = _masked_exp(sums.unsqueeze(-2) - sums.unsqueeze(-3), keep)  # (..., C, C, K)
        scores = torch.einsum("...ik,...ijk->...ij", q.expand_as(sums), between * k.unsqueeze(-3))
    if first is not None:
        from_start, to_end = from_start * first, to_end * last
    written = (k * to_end).mT @ heads  # (B, N, G, R, K, V)
    decay = from_start[..., -1, :].unsqueeze(-1)
    before, S = _carry(S0.unflatten(1, (G, R)), decay, written)
    o = scores @ heads + (q * from_start) @ before
    return o.flatten(2, 3).movedim(2, 3), S.flatten(1, 2)


def _carry(S: Tensor, decay: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """States before every chunk, stacked over chunks, and the one after the last."""
    before = []
    for decay_n, written_n in zip(decay.unbind(1), written.unbind(1)):
        before.append(S)
        S = torch.addcmul(written_n, decay_n, S)
    return torch.stack(before, 1), S


def _as_vector_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """V = 1 with a decay per key (Mamba): H * K independent scalars, in pieces of memory."""
    B, T, G, _ = q.shape
    H, K = log_a.shape[2:]
    R, S, outputs = H // G, S0.flatten(1), []
    for begin in range(0, T, _CHUNK):
        piece = slice(begin, begin + _CHUNK)
        b = v[:, piece].unflatten(2, (G, R)) * k[:, piece].unsqueeze(3)  # (B, t, G, R, K)
        starts = None if reset is None else reset[:, piece]
        h, S = torch_scan.vector_scan(log_a[:, piece].flatten(2), b.flatten(2), S, starts)
        h = h.unflatten(2, (G, R, K))
        outputs.append(torch.einsum("btgk,btgrk->btgr", q[:, piece], h).flatten(2))
    return torch.cat(outputs, 1).unsqueeze(-1), S.view(B, H, K, 1)
