"""The C kernels as torch operators: `statewright::vector_scan` and `statewright::gated_scan`.

Each has a fake kernel (for torch.compile and export) and a gradient, itself an operator without
a gradient, so that differentiating twice raises. The `run_*` functions below them call C at once.
"""

import torch
from torch import Tensor

from statewright.ops.native_library import kernel

# The bits of `cell` in the gated kernels, as in csrc/gated.h.
POSITIVE, NORMALIZE, LSTM = 1, 2, 4

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# Every contiguous tensor below keeps a name until the call has returned: the address of a
# temporary would be reused by the next one.


def run_scan(log_a: Tensor, b: Tensor, h0: Tensor, reset: Tensor | None) -> Pair:
    log_a, b, h0, reset = log_a.contiguous(), b.contiguous(), h0.contiguous(), _contiguous(reset)
    h, h_T = b.new_empty(b.shape), h0.new_empty(h0.shape)
    kernel("scan_forward", b.dtype)(
        log_a.data_ptr(), b.data_ptr(), h0.data_ptr(), _address(reset),
        h.data_ptr(), h_T.data_ptr(), *b.shape, torch.get_num_threads(),
    )  # fmt: skip
    return h, h_T


def run_scan_backward(
    dh: Tensor | None,
    dh_T: Tensor | None,
    log_a: Tensor,
    h: Tensor,
    h0: Tensor,
    reset: Tensor | None,
) -> Triple:
    dh, dh_T, reset = _contiguous(dh), _contiguous(dh_T), _contiguous(reset)
    log_a, h, h0 = log_a.contiguous(), h.contiguous(), h0.contiguous()
    dlog_a, db, dh0 = (t.new_empty(t.shape) for t in (log_a, h, h0))
    kernel("scan_backward", h.dtype)(
        log_a.data_ptr(), h.data_ptr(), h0.data_ptr(), _address(reset), _address(dh),
        _address(dh_T), dlog_a.data_ptr(), db.data_ptr(), dh0.data_ptr(),
        *h.shape, torch.get_num_threads(),
    )  # fmt: skip
    return dlog_a, db, dh0


def run_gated(
    p: Tensor,
    h0: Tensor,
    init: Tensor | None,
    flags: Tensor | None,
    cell: int,
    decay: float = 1.0,
    write: float = 1.0,
) -> Pair:
    p, h0, init, flags = p.contiguous(), h0.contiguous(), _contiguous(init), _contiguous(flags)
    (B, T, _), D = p.shape, h0.shape[1]
    h, h_T = p.new_empty((B, T, D)), h0.new_empty((B, D))
    kernel("gated_forward", p.dtype)(
        p.data_ptr(), h0.data_ptr(), _address(init), _address(flags),
        h.data_ptr(), h_T.data_ptr(), B, T, D, decay, write, cell, torch.get_num_threads(),
    )  # fmt: skip
    return h, h_T


def run_gated_backward(
    dh: Tensor | None,
    dh_T: Tensor | None,
    p: Tensor,
    h: Tensor,
    h0: Tensor,
    init: Tensor | None,
    flags: Tensor | None,
    cell: int,
    decay: float = 1.0,
    write: float = 1.0,
) -> Triple:
    dh, dh_T, init, flags = map(_contiguous, (dh, dh_T, init, flags))
    p, h, h0 = p.contiguous(), h.contiguous(), h0.contiguous()
    dp, dh0 = p.new_empty(p.shape), h0.new_empty(h0.shape)
    dinit = None if init is None else h0.new_empty(h0.shape)
    kernel("gated_backward", p.dtype)(
        p.data_ptr(), h.data_ptr(), h0.data_ptr(), _address(init), _address(flags), _address(dh),
        _address(dh_T), dp.data_ptr(), dh0.data_ptr(), _address(dinit),
        *h.shape, decay, write, cell, torch.get_num_threads(),
    )  # fmt: skip
    return dp, dh0, h0.new_empty(0) if dinit is None else dinit.sum(0)


scan_op = torch.library.custom_op(
    "statewright::vector_scan", run_scan, mutates_args=(), device_types="cpu"
)
scan_backward_op = torch.library.custom_op(
    "statewright::vector_scan_backward", run_scan_backward, mutates_args=(), device_types="cpu"
)
gated_op = torch.library.custom_op(
    "statewright::gated_scan", run_gated, mutates_args=(), device_types="cpu"
)
gated_backward_op = torch.library.custom_op(
    "statewright::gated_scan_backward", run_gated_backward, mutates_args=(), device_types="cpu"
)


@scan_op.register_fake
def _(log_a, b, h0, reset):
    return b.new_empty(b.shape), h0.new_empty(h0.shape)


@scan_backward_op.register_fake
def _(dh, dh_T, log_a, h, h0, reset):
    return log_a.new_empty(log_a.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


@gated_op.register_fake
def _(p, h0, init, flags, cell, decay=1.0, write=1.0):
    return p.new_empty((*p.shape[:2], h0.shape[1])), h0.new_empty(h0.shape)


@gated_backward_op.register_fake
def _(dh, dh_T, p, h, h0, init, flags, cell, decay=1.0, write=1.0):
    dinit = h0.new_empty(0 if init is None else init.shape)
    return p.new_empty(p.shape), h0.new_empty(h0.shape), dinit


def _save_scan(ctx, inputs, output):
    log_a, _, h0, reset = inputs
    ctx.save_for_backward(log_a, output[0], h0, reset)
    ctx.set_materialize_grads(False)


def _scan_gradient(ctx, dh, dh_T):
    grads = (run_scan_backward if call_c(dh, dh_T) else scan_backward_op)(
        dh, dh_T, *ctx.saved_tensors
    )
    return *grads, None


def _save_gated(ctx, inputs, output):
    p, h0, init, flags, *choice = inputs
    ctx.save_for_backward(p, output[0], h0, init, flags)
    ctx.set_materialize_grads(False)
    ctx.choice = choice


def _gated_gradient(ctx, dh, dh_T):
    run = run_gated_backward if call_c(dh, dh_T) else gated_backward_op
    dp, dh0, dinit = run(dh, dh_T, *ctx.saved_tensors, *ctx.choice)
    return dp, dh0, dinit if ctx.needs_input_grad[2] else None, *[None] * (1 + len(ctx.choice))


scan_op.register_autograd(_scan_gradient, setup_context=_save_scan)
gated_op.register_autograd(_gated_gradient, setup_context=_save_gated)


def call_c(*tensors: Tensor | None) -> bool:
    """Whether C may be called at once: plain tensors, no gradient wanted, nothing tracing.

    The dispatcher costs more than a whole step of a small model; but only the dispatcher knows
    torch.compile, export, functorch, dispatch modes and tensor subclasses.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    wanted = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.is_neg() or (wanted and t.requires_grad):
            return False
    return True


_PLAIN = {Tensor, torch.nn.Parameter}
