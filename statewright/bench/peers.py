"""Peers, each skipped where it is not installed (benchmarks/requirements.txt has them)."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable

import torch
from torch import Tensor


def pscan() -> Callable[[Tensor, Tensor], Tensor] | None:
    """mambapy's parallel scan h_t = a_t h_{t-1} + b_t from zero; a, b (B, T, D)."""
    with contextlib.suppress(ImportError):
        from mambapy.pscan import pscan as scan

        return lambda a, b: scan(a.unsqueeze(-1), b.unsqueeze(-1)).squeeze(-1)
    return None


def associative_scan() -> Callable[[Tensor, Tensor], Tensor]:
    """torch's own associative scan, eager, in its generic mode."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return x[0] * y[0], y[0] * x[1] + y[1]

    return lambda a, b: scan(combine, (a, b), dim=1, combine_mode="generic")[1]


def minimal_layer(kind: str, hidden_size: int) -> torch.nn.Module | None:
    """mingru-pytorch's minGRU or minLSTM (log space, no bias, no learned initial state)."""
    with contextlib.suppress(ImportError):
        name = {"mingru": "minGRU", "minlstm": "minLSTM"}[kind]
        module = importlib.import_module(f"minGRU_pytorch.{name}")
        return getattr(module, name)(hidden_size)
    return None
