"""The vector scan against torch operations that move the same bytes, and against other scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from statewright import ops
from statewright.bench import peers
from statewright.bench.protocol import Case, error_of
from statewright.ops import native
from statewright.ops.native_library import kernel

SHAPES = [(8, 1024, 256), (64, 512, 64), (4, 4096, 1024), (1, 65536, 512)]
# Slow peers are left out where one round would take many seconds.
_HUGE = 2**24


def cases(quick: bool) -> Iterator[Case]:
    """Forward and forward+backward at every shape, float32."""
    for shape in SHAPES[:2] if quick else SHAPES:
        yield forward(*shape)
        yield backward(*shape)


def forward(B: int, T: int, D: int) -> Case:
    """12 bytes per element: read a, read b, write h. Floors allocate as the methods do."""
    log_a, b, h0 = _inputs(B, T, D)
    out = torch.empty_like(b)
    methods: dict[str, Callable] = {
        "floor: torch.add": lambda: torch.add(log_a, b),
        "floor: torch.add(out=)": lambda: torch.add(log_a, b, out=out),
        "torch": lambda: ops.vector_scan(log_a, b, h0, backend="torch"),
    }
    if native.available():
        methods["native"] = lambda: ops.vector_scan(log_a, b, h0, backend="native")
        methods["native, preallocated"] = lambda: _into(log_a, b, h0, out)
    methods |= _peers(log_a, b, h0)
    results = {n: _result(m()) for n, m in methods.items() if "floor" not in n and "into" not in n}
    want, _ = ops.vector_scan(log_a.double(), b.double(), h0.double(), backend="torch")
    errors = {name: error_of(got, want) for name, got in results.items()}
    tolerance = {n: 5e-7 for n in errors if n.startswith(("native", "torch"))}
    name = f"vector_scan forward {(B, T, D)}"
    return Case(name, "floor: torch.add", _without_gradients(methods), errors, tolerance)


def backward(B: int, T: int, D: int) -> Case:
    """32 bytes per element: 12 forward; read a, h, dh and write da, db backward."""
    log_a, b, h0 = (t.requires_grad_() for t in _inputs(B, T, D))
    g = torch.randn(B, T, D)

    def run(scan: Callable) -> Callable:
        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(_result(scan()), (log_a, b), g)

        return both

    x, y = log_a.detach(), b.detach()
    methods: dict[str, Callable] = {
        "floor: three operations": lambda: (torch.add(x, y), torch.add(x, y), torch.neg(x)),
        "torch": run(lambda: ops.vector_scan(log_a, b, h0, backend="torch")),
    }
    if native.available():
        methods["native"] = run(lambda: ops.vector_scan(log_a, b, h0, backend="native"))
    methods |= {name: run(method) for name, method in _peers(log_a, b, h0).items()}
    wide = [t.detach().double().requires_grad_() for t in (log_a, b, h0)]
    h, _ = ops.vector_scan(*wide, backend="torch")
    want = torch.autograd.grad(h, wide[:2], g.double())
    errors = {
        name: max(error_of(got, w) for got, w in zip(method(), want))
        for name, method in methods.items()
        if "floor" not in name
    }
    tolerance = {n: 5e-7 for n in errors if n.startswith(("native", "torch"))}
    name = f"vector_scan forward+backward {(B, T, D)}"
    return Case(name, "floor: three operations", methods, errors, tolerance)


def _inputs(B: int, T: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_a = torch.nn.functional.logsigmoid(torch.randn(B, T, D, generator=generator))
    # Log space takes b >= 0 only; for the others the sign makes no difference to the speed.
    return log_a, torch.rand(B, T, D, generator=generator), torch.zeros(B, D)


def _peers(log_a: Tensor, b: Tensor, h0: Tensor) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    scan = peers.pscan()
    if scan is not None:
        found["mambapy pscan"] = lambda: scan(log_a.exp(), b)
    found["log space (Heinsen)"] = lambda: ops.vector_scan(log_a, b, h0, backend="log")
    if b.numel() < _HUGE:
        torch_scan = peers.associative_scan()
        found["torch associative_scan"] = lambda: torch_scan(log_a.exp(), b)
        found["token loop"] = lambda: ops.vector_scan(log_a, b, h0, backend="ref")
    return found


def _into(log_a: Tensor, b: Tensor, h0: Tensor, h: Tensor) -> Tensor:
    """The kernel alone, on an output that exists already."""
    last = torch.empty_like(h0)
    pointers = (t.data_ptr() for t in (log_a, b, h0))
    kernel("scan_forward", b.dtype)(
        *pointers, None, h.data_ptr(), last.data_ptr(), *b.shape, torch.get_num_threads()
    )
    return h


def _without_gradients(methods: dict[str, Callable]) -> dict[str, Callable]:
    return {name: torch.no_grad()(method) for name, method in methods.items()}


def _result(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
