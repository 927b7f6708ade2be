"""Rows of unequal length: bring each row's unmasked tokens to the front, and put them back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """order (B, T): where to read each token from; lengths (B,): unmasked tokens per row."""

    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Compaction:
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        return cls(order, mask.sum(1))

    def pack(self, x: Tensor) -> Tensor:
        """x (B, T, ...) with every row's unmasked tokens first, in order."""
        return torch.take_along_dim(x, self._as(x), 1)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`."""
        inverse = torch.argsort(self.order, dim=1)
        return torch.take_along_dim(x, inverse.view(*inverse.shape, *[1] * (x.dim() - 2)), 1)

    def _as(self, x: Tensor) -> Tensor:
        return self.order.view(*self.order.shape, *[1] * (x.dim() - 2))
