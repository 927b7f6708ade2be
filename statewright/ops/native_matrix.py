"""The matrix scan in C for the CPU: `statewright::matrix_scan`, forward and backward.

Where V > 1 or the decay is per head, a tile of the state stays in registers over the tokens of a
chunk; where V = 1 with a decay per key (Mamba), channels are scalars. Both give the same bits for
any number of threads. Not differentiable twice, nor in forward mode: both raise.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd import forward_ad

from statewright.ops.native_library import STATE_DTYPES, kernel
from statewright.ops.native_ops import call_c

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# As in csrc: what a unit of work of the backward adds up by itself, in heads of a group, in bytes
# of keys, and, where V = 1, in numbers of state.
_HEADS, _LANE_BYTES, _NUMBERS = 8, 256, 2048
_Sizes = ctypes.c_int64 * 13


def matrix_scan(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None = None
) -> Pair:
    """See `ops.matrix_scan`; q, k and v may be slices of a wider projection, without a copy.

    q, k, v in one dtype, float32, float64 or bfloat16; log_a and S0 in float32 (float64 for
    float64), log_a also in theirs. The gradient takes, per thread, T (V / 64 + 1) times 256 bytes,
    or T times 256 bytes where V = 1 (float32). Raises ValueError for other dtypes or
    devices, RuntimeError without the library.
    """
    if not supports(q, k, v, log_a, S0, reset):
        found = ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v, log_a, S0))
        raise ValueError(f"matrix_scan: the C kernel does not take q, k, v, log_a, S0 in {found}")
    log_a = log_a.to(S0.dtype)
    if call_c(q, k, v, log_a, S0) and forward_ad._current_level < 0:
        return run(q, k, v, log_a, S0, reset)
    _refuse_tangents(q, k, v, log_a, S0)
    return matrix_op(q, k, v, log_a, S0, reset)


def supports(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None = None
) -> bool:
    """Whether the kernel takes these dtypes and devices; it must also have been built."""
    sequence, state = v.dtype, STATE_DTYPES.get(v.dtype)
    if not (q.dtype == k.dtype == sequence and S0.dtype == state):
        return False
    if log_a.dtype not in (sequence, state):
        return False
    if reset is not None and reset.dtype not in (torch.bool, torch.uint8):
        return False
    tensors = (q, k, v, log_a, S0) if reset is None else (q, k, v, log_a, S0, reset)
    return all(t.device.type == "cpu" for t in tensors)


def _tokens(t: Tensor) -> Tensor:
    """The tensor itself where the two axes of a token are contiguous, else a copy."""
    _, _, rows, columns = t.shape
    *_, by_row, by_column = t.stride()
    if (by_column == 1 or columns == 1) and (by_row == columns or rows == 1):
        return t
    return t.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> ctypes.Array:
    B, T, G, K = q.shape
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    return _Sizes(B, T, G, v.shape[2], K, v.shape[3], log_a.shape[3], *strides)


def _by_channel(v: Tensor, log_a: Tensor) -> bool:
    return v.shape[3] == 1 and log_a.shape[3] > 1


# Every tensor below keeps a name until the call has returned: the address of a temporary would be
# reused by the next one.


def run(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, S0: Tensor, reset: Tensor | None) -> Pair:
    q, k, v, log_a, S0 = _tokens(q), _tokens(k), _tokens(v), log_a.contiguous(), S0.contiguous()
    reset = None if reset is None else reset.contiguous()
    o = v.new_empty(v.shape)
    if not (S0.numel() and v.numel()):
        return o.zero_(), S0.clone()
    S_T = S0.new_empty(S0.shape)
    name = "vector_forward" if _by_channel(v, log_a) else "matrix_forward"
    failed = kernel(name, v.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), log_a.data_ptr(), S0.data_ptr(),
        None if reset is None else reset.data_ptr(), o.data_ptr(), S_T.data_ptr(),
        _sizes(q, k, v, log_a), torch.get_num_threads(),
    )  # fmt: skip
    _check(failed)
    return o, S_T


def run_backward(
    do: Tensor | None,
    dS_T: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    S0: Tensor,
    reset: Tensor | None,
) -> Gradients:
    q, k, v, log_a, S0 = _tokens(q), _tokens(k), _tokens(v), log_a.contiguous(), S0.contiguous()
    reset = None if reset is None else reset.contiguous()
    do = v.new_zeros(v.shape) if do is None else do.contiguous()
    dS_T = None if dS_T is None else dS_T.contiguous()
    if not (S0.numel() and v.numel()):
        zeros = [t.new_zeros(t.shape) for t in (q, k, v, log_a, S0)]
        return *zeros[:4], zeros[4] if dS_T is None else dS_T.clone()
    dv, dS0 = v.new_empty(v.shape), S0.new_empty(S0.shape)
    K, heads, channels = q.shape[3], v.shape[2] // q.shape[2], _by_channel(v, log_a)
    by_keys = 1 if log_a.shape[3] > 1 else -(-K * S0.element_size() // _LANE_BYTES)
    parts = -(-heads // (max(_NUMBERS // K, 1) if channels else _HEADS))
    dq, dk = S0.new_empty((parts, *q.shape)), S0.new_empty((parts, *k.shape))
    dlog_a = S0.new_empty((by_keys, *log_a.shape))
    failed = kernel("vector_backward" if channels else "matrix_backward", v.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), log_a.data_ptr(), S0.data_ptr(),
        None if reset is None else reset.data_ptr(), do.data_ptr(),
        None if dS_T is None else dS_T.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        dlog_a.data_ptr(), dS0.data_ptr(), _sizes(q, k, v, log_a), torch.get_num_threads(),
    )  # fmt: skip
    _check(failed)
    return _added(dq).to(q.dtype), _added(dk).to(k.dtype), dv, _added(dlog_a), dS0


def _added(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("matrix_scan: no memory for the work space of the C kernel")


matrix_op = torch.library.custom_op(
    "statewright::matrix_scan", run, mutates_args=(), device_types="cpu"
)
matrix_backward_op = torch.library.custom_op(
    "statewright::matrix_scan_backward", run_backward, mutates_args=(), device_types="cpu"
)


@matrix_op.register_fake
def _(q, k, v, log_a, S0, reset):
    return v.new_empty(v.shape), S0.new_empty(S0.shape)


@matrix_backward_op.register_fake
def _(do, dS_T, q, k, v, log_a, S0, reset):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, log_a, S0))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dS_T):
    grads = (run_backward if call_c(do, dS_T) else matrix_backward_op)(do, dS_T, *ctx.saved_tensors)
    return *grads, None


matrix_op.register_autograd(_gradient, setup_context=_save)


def _refuse_tangents(*tensors: Tensor) -> None:
    # An operator without a forward-mode formula would drop tangents without a word.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("matrix_scan: the C kernel has no forward-mode gradient")
