"""Finds, checks and opens the C library; nothing here raises when it is absent."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library is opened: both then share one OpenMP runtime

from statewright.ops.native_digest import source_digest

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_DOUBLE = ctypes.c_double
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
# Pointers, then B, T, D; gated kernels: two factors, the choice of cell; the number of threads.
_KERNELS = {
    "scan_forward": [_POINTER] * 6 + [_SIZE] * 3 + [_INT],
    "scan_backward": [_POINTER] * 9 + [_SIZE] * 3 + [_INT],
    "gated_forward": [_POINTER] * 6 + [_SIZE] * 3 + [_DOUBLE] * 2 + [_INT] * 2,
    "gated_backward": [_POINTER] * 10 + [_SIZE] * 3 + [_DOUBLE] * 2 + [_INT] * 2,
    # The last pointer is to the sizes. These return 1 where there is no memory for their work.
    "matrix_forward": [_POINTER] * 9 + [_INT],
    "matrix_backward": [_POINTER] * 14 + [_INT],
    "vector_forward": [_POINTER] * 9 + [_INT],
    "vector_backward": [_POINTER] * 14 + [_INT],
}
_RETURNS_STATUS = ("matrix_", "vector_")

# The state and everything carried is at least float32, whatever the dtype in memory.
STATE_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}


def open_library(library: Path, sources: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason why it must not be used."""
    if not library.exists():
        return None, f"{library.name} was not built (no C compiler at install time?)"
    try:
        opened = ctypes.CDLL(str(library))
        opened.sw_digest.restype = ctypes.c_char_p
        built_from, found = opened.sw_digest().decode(), source_digest(sources)
    except (OSError, AttributeError) as error:
        return None, f"{library.name} cannot be used: {error}"
    if built_from != found:
        return None, (
            f"{library.name} is stale: built from sources {built_from}, found {found}; "
            "reinstall statewright to rebuild it"
        )
    return opened, None


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    here = Path(__file__).parent
    return open_library(here / "libstatewright.so", here / "csrc")


@cache
def kernel(name: str, dtype: torch.dtype) -> Any:
    """The C function `name` for `dtype`; raises RuntimeError without a library."""
    opened, reason = library()
    if opened is None:
        raise RuntimeError(f"the C kernels are not available: {reason}")
    function = getattr(opened, f"sw_{name}_{_SUFFIXES[dtype]}")
    function.argtypes = _KERNELS[name]
    function.restype = _INT if name.startswith(_RETURNS_STATUS) else None
    return function
