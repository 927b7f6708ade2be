"""Scans: the two recurrences behind every mixer, each with several backends.

| backend  | what it is                                                               |
|----------|--------------------------------------------------------------------------|
| `ref`    | a loop over tokens in any dtype: the definition                          |
| `torch`  | chunked, in the linear domain, any device, differentiable twice           |
| `log`    | the minimal-RNN paper's log-space form; needs b >= 0, loses accuracy in T |
| `native` | C kernels for the CPU: float32, float64, bfloat16; one derivative         |
| `auto`   | `native` where it was built and takes the inputs, else `torch`            |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from statewright.ops import log_space, native, native_matrix, ref, torch_matrix, torch_scan
from statewright.shapes import require

VECTOR_BACKENDS: dict[str, Callable] = {
    "ref": ref.vector_scan,
    "torch": torch_scan.vector_scan,
    "log": log_space.vector_scan,
    "native": native.vector_scan,
}

MATRIX_BACKENDS: dict[str, Callable] = {
    "ref": ref.matrix_scan,
    "torch": torch_matrix.matrix_scan,
    "native": native_matrix.matrix_scan,
}

# The open blocks of this thread (or task), innermost last. Each block removes its own entry, so
# blocks that close in another order than they opened leave nothing behind.
_BLOCKS: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("statewright_backend", default=())


@contextmanager
def default_backend(name: str) -> Iterator[None]:
    """Within the block, this thread's scans called without `backend=` use this one.

    Other threads and asyncio tasks keep their own choice. A compiled graph keeps the choice that
    held when it was traced. A kind of scan without this backend (`log` has no matrix form) takes
    `auto`, announced once. Raises ValueError for a name that no kind of scan knows.

    >>> log_a, b = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
    >>> with default_backend("ref"):
    ...     h, _ = vector_scan(log_a, b, torch.zeros(1, 1))
    >>> h.flatten()
    tensor([1., 2., 3.])
    """
    _require_known(name, {**VECTOR_BACKENDS, **MATRIX_BACKENDS})
    block = (object(), name)
    _BLOCKS.set((*_BLOCKS.get(), block))
    try:
        yield
    finally:
        _BLOCKS.set(tuple(b for b in _BLOCKS.get() if b is not block))


def vector_scan(
    log_a: Tensor,
    b: Tensor,
    h0: Tensor,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elementwise recurrence `h_t = exp(log_a_t) * h_{t-1} + b_t` over the token axis.

    log_a, b (B, T, D); h0 (B, D); reset (B, T) bool: where set, the state before that token is
    zero. Returns h (B, T, D) in b's dtype and h_T (B, D), carried in at least float32 whatever
    the inputs' dtype. log_a = -inf is a decay of exactly 0. Differentiable in log_a, b and h0,
    also through h_T. T = 0 returns h0. Raises ValueError for shapes that do not fit.
    Eq. of section 2.3 ("parallel scan") of arXiv:2410.01201, whose own form is `backend="log"`.

    >>> halves, ones = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    >>> h, h_T = vector_scan(halves.log(), ones, torch.zeros(1, 1))
    >>> h.flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    B, T, D = require("vector_scan", "b", b, "B T D")
    require("vector_scan", "log_a", log_a, "B T D", B=B, T=T, D=D)
    require("vector_scan", "h0", h0, "B D", B=B, D=D)
    if reset is not None:
        require("vector_scan", "reset", reset, "B T", B=B, T=T)
    if T == 0:
        return torch.empty_like(b), h0.to(state_dtype(b.dtype, h0.dtype), copy=True)
    fits = native_fits(log_a, b, state=h0)
    return _choose("vector", backend, VECTOR_BACKENDS, fits)(log_a, b, h0, reset)


def matrix_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    S0: Tensor,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(log_a_t)) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t`: Mamba-2, GLA, Mamba.

    q, k (B, T, G, K), shared by the H / G heads of a group and never expanded; v (B, T, H, V);
    log_a (B, T, H, K) or (B, T, H, 1), at most 0, -inf for a decay of exactly 0; S0
    (B, H, K, V); reset (B, T) bool: where set, the state before that token is zero. Returns o
    (B, T, H, V) in v's dtype and S_T, carried in at least float32. Differentiable in everything,
    also through S_T. Raises ValueError for shapes that do not fit.
    Eq. 2.1 of arXiv:2312.06635 (GLA), eq. 16 of arXiv:2405.21060 (Mamba-2, S transposed).

    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> o, S = matrix_scan(q, k, v, torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, 1))
    >>> o.flatten()
    tensor([1., 2., 3.])
    """
    B, T, G, K = require("matrix_scan", "q", q, "B T G K")
    require("matrix_scan", "k", k, "B T G K", B=B, T=T, G=G, K=K)
    _, _, H, V = require("matrix_scan", "v", v, "B T H V", B=B, T=T)
    keys = 1 if log_a.shape[-1:] == (1,) else K
    require("matrix_scan", "log_a", log_a, "B T H K", B=B, T=T, H=H, K=keys)
    require("matrix_scan", "S0", S0, "B H K V", B=B, H=H, K=K, V=V)
    if reset is not None:
        require("matrix_scan", "reset", reset, "B T", B=B, T=T)
    if H % G:
        raise ValueError(f"matrix_scan: {G} groups of q and k do not divide {H} heads of v")
    if T == 0:
        return torch.empty_like(v), S0.to(state_dtype(v.dtype, S0.dtype), copy=True)
    fits = native_matrix.supports(q, k, v, log_a, S0, reset) and _native_is_built()
    return _choose("matrix", backend, MATRIX_BACKENDS, fits)(q, k, v, log_a, S0, reset)


def state_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype a state is carried in: at least float32; float64 and complex stay."""
    return ref.state_dtype(*dtypes)


def use_fused(x: Tensor, state: Tensor) -> bool:
    """Whether a mixer takes its fused C kernel on these tensors, under the default backend."""
    return _default("vector") in ("auto", "native") and native_fits(x, state=state)


def native_fits(*sequences: Tensor, state: Tensor) -> bool:
    """Whether the C kernels were built and take these; their absence is announced once.

    Only what needs no conversion: it would round a wider state or finer decays, silently.
    """
    dtype = sequences[0].dtype
    same = all(x.dtype == dtype for x in sequences) and state.dtype == state_dtype(dtype)
    return same and native.supports(*sequences, state) and _native_is_built()


@torch.compiler.assume_constant_result
def _native_is_built() -> bool:
    if not native.available():
        _announce_absence()
        return False
    return True


@cache
def _announce_absence() -> None:
    warnings.warn(
        f"the C kernels are not used ({native.why_unavailable()}); scans run in plain torch, "
        "several times slower on a CPU",
        stacklevel=2,
    )


def _choose(kind: str, name: str | None, backends: dict[str, Callable], fits: bool) -> Callable:
    if name is None:
        name = _default(kind)
    else:
        _require_known(name, backends)
    if name == "auto":
        name = "native" if fits else "torch"
    return backends[name]


# torch.compile cannot trace a ContextVar; so it takes what this returns while it traces.
@torch.compiler.assume_constant_result
def _default(kind: str) -> str:
    """The name that this thread chose, or "auto" where scans of this kind have no such backend."""
    blocks = _BLOCKS.get()
    name = blocks[-1][1] if blocks else "auto"
    known = VECTOR_BACKENDS if kind == "vector" else MATRIX_BACKENDS
    if name == "auto" or name in known:
        return name
    _announce_kind(kind, name)
    return "auto"


@cache
def _announce_kind(kind: str, name: str) -> None:
    warnings.warn(f"{kind} scans have no backend {name!r}; they take 'auto'", stacklevel=2)


def _require_known(name: str, backends: dict[str, Callable]) -> None:
    if name != "auto" and name not in backends:
        known = ", ".join(["auto", *backends])
        raise ValueError(f"unknown scan backend {name!r} (known: {known})")
