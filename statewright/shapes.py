"""One check for shapes at public boundaries, with an error that says what was expected."""

from __future__ import annotations

from torch import Tensor


def require(where: str, name: str, tensor: Tensor, axes: str, **sizes: int) -> tuple[int, ...]:
    """Return the tensor's shape if it has these axes and the given sizes; else ValueError.

    `require("vector_scan", "h0", h0, "B D", B=2, D=64)` on a (3, 64) tensor says
    `vector_scan: h0 is (3, 64), expected (B, D) = (2, 64)`. Axes without a size accept any.
    """
    shape, names = tuple(tensor.shape), axes.split()
    expected = [sizes.get(axis) for axis in names]
    fits = len(shape) == len(names) and all(w in (None, h) for w, h in zip(expected, shape))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{where}: {name} is {shape}, expected ({', '.join(names)}) = ({wanted})")
    return shape
