"""Another machine on this one: matrix products that round otherwise, weights that lie elsewhere."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.addbmm.default,
    _ATEN.mv.default,
    _ATEN.addmv.default,
    _ATEN.dot.default,
}
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


class OtherRounding(TorchDispatchMode):
    """Moves every number that a matrix product gives by up to `ulps` units in its last place.

    In 16 bits by one: sums are kept in 32, so that machines differ in the last rounding alone.

    How far depends on the operation, on shapes and on alignment (and, `per_call`, on how many
    products came before), as it does between one BLAS and the next: the same call on the same
    memory gives the same bits, another shape or a batch gives others. It acts in backward too.
    """

    def __init__(self, seed: int = 0, ulps: int = 2, per_call: bool = False) -> None:
        super().__init__()
        self.seed, self.ulps, self.per_call, self.calls = seed, ulps, per_call, 0
        self.shifts: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function not in _PRODUCTS or out.dtype not in _BITS or not out.numel():
            return out
        self.calls += 1
        tensors = [a for a in args if isinstance(a, Tensor)]
        key = (str(function), out.dtype, *((tuple(t.shape), t.data_ptr() % 16) for t in tensors))
        key = (*key, self.calls) if self.per_call else key
        shift = self.shifts.get(key)
        if shift is None:
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, key)).encode()))
            ulps = min(self.ulps, 1) if out.element_size() == 2 else self.ulps
            shift = torch.randint(-ulps, ulps + 1, out.shape, generator=generator)
            shift = shift.to(_BITS[out.dtype])
            if not self.per_call:
                self.shifts[key] = shift
        moved = (out.contiguous().view(_BITS[out.dtype]) + shift).view(out.dtype)
        # Neighbours of zero, infinity and NaN in bits are not their neighbours in value.
        regular = out.isfinite() & (out.abs() >= torch.finfo(out.dtype).tiny * 16)
        return torch.where(regular, moved, out)


def misaligned(module: nn.Module) -> nn.Module:
    """The module itself, every weight moved to an address of 8 mod 16, as in a mapped file."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel() and tensor.element_size() <= 8:
            pad = 8 // tensor.element_size()
            flat = torch.empty(tensor.numel() + pad, dtype=tensor.dtype)[pad:]
            tensor.data = flat.view(tensor.shape).copy_(tensor.data)
            assert tensor.data_ptr() % 16 == 8
    return module
