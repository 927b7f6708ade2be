"""The minimal-RNN paper's own parallel form: Heinsen's scan in log space.

Kept for comparison under the name `log`. It takes positive b only, and because it takes
differences of a cumulative sum over the whole sequence, its relative error grows with
|sum log a|: 3e-3 at T = 65,536 in float32, where the linear scan stays at 1e-7. Resets and
decays of exactly 0 would turn that sum into -inf; the sequence is cut there instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statewright.ops.ref import state_dtype


def log_space_scan(log_a: Tensor, log_b: Tensor, log_h0: Tensor) -> Tensor:
    """log h_t of `h_t = a_t h_{t-1} + b_t` (arXiv:2410.01201, appendix B.1; arXiv:2311.06281).

    log_a, log_b (B, T, D) and log_h0 (B, D), all finite; returns log h (B, T, D).
    log_h0 is the logarithm of an actual state, never `log_g` of a carried one (one of the
    paper's two listings has it that way).
    """
    total = torch.cat([torch.zeros_like(log_a[:, :1]), log_a.cumsum(1)], 1)
    values = torch.cat([log_h0.unsqueeze(1), log_b], 1)
    return (total + torch.logcumsumexp(values - total, 1))[:, 1:]


def vector_scan(
    log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.vector_scan`; raises ValueError for complex, b < 0 or h0 < 0."""
    if b.is_complex() or (b < 0).any() or (h0 < 0).any():
        raise ValueError(
            "vector_scan: the log backend takes real b >= 0 and h0 >= 0 (the positive form of "
            "minGRU and minLSTM); use backend='torch' for signed values"
        )
    dtype = state_dtype(log_a.dtype, b.dtype, h0.dtype)
    tiny = torch.finfo(dtype).tiny
    log_a, log_b = log_a.to(dtype), b.to(dtype).clamp_min(tiny).log()
    h, outputs = h0.to(dtype), []
    cuts = _cuts(log_a, reset)
    for start, stop in zip(cuts, [*cuts[1:], b.shape[1]]):
        # The first token of a piece is taken in the linear domain: its decay may be exactly 0.
        if reset is not None:
            h = h.masked_fill(reset[:, start, None].bool(), 0)
        first = log_a[:, start].exp() * h + log_b[:, start].exp()
        pieces = [first.unsqueeze(1)]
        if stop - start > 1:
            rest = slice(start + 1, stop)
            pieces.append(
                log_space_scan(log_a[:, rest], log_b[:, rest], first.clamp_min(tiny).log()).exp()
            )
        outputs += pieces
        h = pieces[-1][:, -1]
    return torch.cat(outputs, 1).to(b.dtype), h.clone()


def _cuts(log_a: Tensor, reset: Tensor | None) -> list[int]:
    """Where a piece must begin: token 0, resets, and decays of exactly 0."""
    begin = torch.isneginf(log_a).any(2).any(0)
    if reset is not None:
        begin = begin | reset.bool().any(0)
    begin[0] = True
    return begin.nonzero().flatten().tolist()
