"""Kernels in C for the CPU: the vector scan, and minGRU and minLSTM fused with it.

They are optional: `available()` says whether they were built, `why_unavailable()` why not.
Sequential in time, vectorised over channels, parallel over rows and blocks of channels, with the
same bits for any number of threads and any split of the tokens. Not differentiable twice, nor in
forward mode: both raise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from statewright.ops import native_ops as ops
from statewright.ops.native_library import STATE_DTYPES, library

# The bits of `flags`.
MASKED, RESET = 1, 2


def available() -> bool:
    """Whether the kernels can be called."""
    return library()[0] is not None


def why_unavailable() -> str | None:
    """Why the kernels cannot be called, in words; None if they can."""
    return library()[1]


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU; float32, float64 or bfloat16.

    A call also wants its sequences in one dtype and its states in at least float32.
    """
    return all(t.device.type == "cpu" and t.dtype in STATE_DTYPES for t in tensors)


def vector_scan(
    log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Elementwise recurrence `h_t = exp(log_a_t) * h_{t-1} + b_t` over the token axis.

    log_a, b (B, T, D), one dtype; h0 (B, D) in float32 (float64 for float64); reset (B, T) bool:
    where set, the state before that token is zero. Returns h (B, T, D) and h_T (B, D), dtypes of
    b and h0, both differentiable. A decay below the smallest normal number counts as exactly 0.
    Raises ValueError for other shapes or dtypes, RuntimeError without the library.
    """
    B, T, D = _sequence("vector_scan", "b", b)
    if log_a.shape != b.shape or log_a.dtype != b.dtype:
        raise _wrong("vector_scan", "log_a", log_a, f"(B, T, D) = {(B, T, D)} {b.dtype} from b")
    _state("vector_scan", b, h0, D)
    _per_token("vector_scan", "reset", reset, (B, T))
    if ops.call_c(log_a, b, h0) and forward_ad._current_level < 0:
        return ops.run_scan(log_a, b, h0, reset)
    _refuse_tangents("vector_scan", log_a, b, h0)
    return ops.scan_op(log_a, b, h0, reset)


def mingru(
    p: Tensor,
    h0: Tensor,
    init: Tensor | None = None,
    flags: Tensor | None = None,
    positive: bool = True,
    factors: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """minGRU on its projection: `h_t = (1 - z_t) h_{t-1} + z_t cand_t`, arXiv:2410.01201, app. A-B.

    p (B, T, 2D) = [k | c], z = sigmoid(k), cand = g(c) if `positive` (g(x) = x + 0.5 for x >= 0,
    sigmoid(x) below), else c. h0 (B, D) in float32 (float64 for float64). flags (B, T) uint8:
    bit 0 (MASKED), the token leaves the state as it is; bit 1 (RESET), before the token the state
    becomes `init` (D), zero if None; a token may be both. Returns h (B, T, D) in p's dtype and
    h_T (B, D); differentiable in p, h0 and init. factors: of decay and of what is written, as in
    `ForgetMore`. The authors scan in log space, this does not.
    """
    return _gated("mingru", p, h0, init, flags, ops.POSITIVE * positive, factors)


def minlstm(
    p: Tensor,
    h0: Tensor,
    init: Tensor | None = None,
    flags: Tensor | None = None,
    positive: bool = True,
    normalize: bool = True,
    factors: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """minLSTM on its projection: `h_t = f'_t h_{t-1} + i'_t cand_t`, arXiv:2410.01201, app. A-B.

    p (B, T, 3D) = [f | i | c] before the sigmoids; f' = f / (f + i) and i' = i / (f + i) if
    `normalize`, as in the paper, else f and i, the authors' default. Everything else as `mingru`.
    """
    cell = ops.LSTM | ops.POSITIVE * positive | ops.NORMALIZE * normalize
    return _gated("minlstm", p, h0, init, flags, cell, factors)


def _gated(
    name: str,
    p: Tensor,
    h0: Tensor,
    init: Tensor | None,
    flags: Tensor | None,
    cell: int,
    factors: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    B, T, width = _sequence(name, "p", p)
    streams = 3 if cell & ops.LSTM else 2
    if width % streams:
        raise _wrong(name, "p", p, f"(B, T, {streams} * D)")
    D = width // streams
    _state(name, p, h0, D)
    if init is not None and ((init.shape, init.dtype, init.device) != ((D,), h0.dtype, h0.device)):
        raise _wrong(name, "init", init, f"(D,) = {(D,)} {h0.dtype}")
    _per_token(name, "flags", flags, (B, T))
    if ops.call_c(p, h0, init) and forward_ad._current_level < 0:
        return ops.run_gated(p, h0, init, flags, cell, *factors)
    _refuse_tangents(name, p, h0, init)
    return ops.gated_op(p, h0, init, flags, cell, *factors)


def _sequence(name: str, argument: str, x: Tensor) -> torch.Size:
    if x.dim() != 3 or x.dtype not in STATE_DTYPES or x.device.type != "cpu":
        raise _wrong(name, argument, x, "(B, T, D) float32, float64 or bfloat16 on the CPU")
    return x.shape


def _state(name: str, x: Tensor, h0: Tensor, D: int) -> None:
    shape, dtype = (x.shape[0], D), STATE_DTYPES[x.dtype]
    if h0.shape != shape or h0.dtype != dtype or h0.device != x.device:
        raise _wrong(name, "h0", h0, f"(B, D) = {tuple(shape)} {dtype}")


def _per_token(name: str, argument: str, x: Tensor | None, shape: tuple[int, int]) -> None:
    if x is None:
        return
    if x.shape != shape or x.dtype not in (torch.bool, torch.uint8) or x.device.type != "cpu":
        raise _wrong(name, argument, x, f"(B, T) = {tuple(shape)} bool or uint8 on the CPU")


def _wrong(name: str, argument: str, x: Tensor, expected: str) -> ValueError:
    got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
    return ValueError(f"{name}: {argument} is {got}, expected {expected}")


def _refuse_tangents(name: str, *tensors: Tensor | None) -> None:
    # An operator without a forward-mode formula would drop tangents without a word.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(f"{name}: the C kernels have no forward-mode gradient")
