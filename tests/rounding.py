"""Another machine on this one: matrix products that round otherwise, weights that lie elsewhere."""

from __future__ import annotations

import warnings
import zlib

import torch
from torch import Tensor, nn

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot")
_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


class OtherRounding:
    """Moves every number that a matrix product gives by up to `ulps` units in its last place.

    In 16 bits by one: sums are kept in 32, so that machines differ in the last rounding alone.

    How far depends on the operation, on shapes and on alignment (and, `per_call`, on how many
    products came before), as it does between one BLAS and the next: the same call on the same
    memory gives the same bits, another shape or a batch gives others. It acts in backward and in
    every thread too: within the block the CPU's kernels of the products are these.
    """

    def __init__(self, seed: int = 0, ulps: int = 2, per_call: bool = False) -> None:
        self.seed, self.ulps, self.per_call, self.calls = seed, ulps, per_call, 0
        self.shifts: dict[tuple, Tensor] = {}

    def __enter__(self) -> OtherRounding:
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in _PRODUCTS:
                self._replace(name, torch.library.get_kernel(f"aten::{name}", "CPU"))
        return self

    def __exit__(self, *failure: object) -> None:
        self.library._destroy()

    def _replace(self, name: str, kernel) -> None:
        def moved(keys, *args, **kwargs) -> Tensor:
            return self._moved(name, kernel.call_boxed(keys, *args, **kwargs), args)

        self.library.impl(name, moved, "CPU", with_keyset=True)

    def _moved(self, name: str, out: Tensor, args: tuple) -> Tensor:
        if out.dtype not in _BITS or not out.numel():
            return out
        self.calls += 1
        tensors = [a for a in args if isinstance(a, Tensor)]
        key = (name, out.dtype, *((tuple(t.shape), t.data_ptr() % 16) for t in tensors))
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
