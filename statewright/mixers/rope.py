"""Rotary position embeddings, as transformers computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(size: int, theta: float, scaling: str, device: torch.device) -> Tensor:
    """theta^(-2i/size), i < size/2, in float32 (RoFormer, arXiv:2104.09864, eq. 15), scaled.

    scaling: "none"; "linear-F" divides by F; "llama3-F-LOW-HIGH-CONTEXT" divides the wavelengths
    beyond CONTEXT / LOW by F, keeps those below CONTEXT / HIGH and blends between. Raises
    ValueError for any other text. float32 whatever the model's dtype, as transformers.
    """
    exponent = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
    inverse = 1.0 / (theta**exponent)
    kind, factors = parse_scaling(scaling)
    if kind == "linear":
        return inverse / factors[0]
    if kind == "llama3":
        factor, low, high, context = factors
        wavelength = 2 * math.pi / inverse
        smooth = (context / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / factor + smooth * inverse
        scaled = torch.where(wavelength > context / low, inverse / factor, inverse)
        between = (wavelength >= context / high) & (wavelength <= context / low)
        return torch.where(between, blended, scaled)
    return inverse


def parse_scaling(text: str) -> tuple[str, tuple[float, ...]]:
    """The kind and its numbers; ValueError for what we do not know."""
    kind, *parts = text.split("-")
    counts = {"none": 0, "linear": 1, "llama3": 4}
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = None
    if numbers is None or counts.get(kind) != len(numbers):
        raise ValueError(
            f"rope_scaling={text!r}, expected 'none', 'linear-FACTOR' or "
            "'llama3-FACTOR-LOW-HIGH-CONTEXT'"
        )
    return kind, numbers


def rotate(x: Tensor, pos: Tensor, inverse: Tensor) -> Tensor:
    """Rotate x (B, H, T, Dh) by its position (B, T): channel i pairs with i + Dh/2."""
    angle = pos.to(torch.float32).unsqueeze(-1) * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    cos, sin = (torch.cat([t, t], -1).unsqueeze(1) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
