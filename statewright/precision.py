"""What a model computes in and where, whatever its layers keep their weights as."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor


def _tensors(model: Any) -> chain[Tensor]:
    buffers = model.buffers() if hasattr(model, "buffers") else ()
    return chain(model.parameters(), buffers)


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of the first parameter, else buffer, of floating numbers of 16 bits or more.

    Quantised weights (int8, float8, packed or no parameters at all) say nothing about what a
    layer returns. float32 if nothing does.
    """
    wide = (t.dtype for t in _tensors(model) if t.is_floating_point() and t.dtype.itemsize > 1)
    return next(wide, torch.float32)


def device_of(model: Any) -> torch.device:
    """The device of the first parameter, else buffer; the CPU if there is none."""
    return next((t.device for t in _tensors(model)), torch.device("cpu"))
