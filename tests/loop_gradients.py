"""What the tests of the C kernels share: numbers, errors, gradients of a kernel and of a loop."""

from __future__ import annotations

import torch
from torch import Tensor

BOTH = (0, 1)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(x: Tensor, y: Tensor) -> float:
    """Largest difference over the largest value."""
    assert x.shape == y.shape and x.isfinite().all() and y.isfinite().all()
    y = y.double()
    return ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item() if y.numel() else 0.0


def differentiate(function, inputs, use=BOTH, dtype=None) -> tuple[Tensor, ...]:
    """Both outputs, and the gradients of a random linear function of those in `use`."""
    return differentiate_each(function, inputs, [use], dtype)[0]


def differentiate_each(function, inputs, uses, dtype=None) -> list[tuple[Tensor, ...]]:
    """As `differentiate` for each of `uses`, all from one call of the function."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs, found = function(*leaves), []
    for use in uses:
        loss = sum(x.double().sum() * 0 for x in leaves)
        for i in use:
            loss = loss + (outputs[i].double() * random(*outputs[i].shape, seed=20 + i)).sum()
        gradients = torch.autograd.grad(loss, leaves, retain_graph=use is not uses[-1])
        found.append((*(x.detach() for x in outputs), *gradients))
    return found
