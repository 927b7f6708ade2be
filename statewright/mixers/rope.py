"""Rotary position embeddings, as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

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


class Turn:
    """Rotates x (B, H, N, Dh) by a place of its own for every slot, in at least float32.

    angles(places (B, H, N)) gives cos and sin (B, H, N, r / 2) of the r rotated channels: the
    first, or the last with `at_end`; channel i pairs with i + r/2, or 2i with 2i + 1 with
    `interleaved`. A value without state: a deep copy is the object itself.
    """

    def __init__(
        self,
        angles: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]],
        interleaved: bool = False,
        at_end: bool = False,
    ) -> None:
        self.angles, self.interleaved, self.at_end = angles, interleaved, at_end

    def __deepcopy__(self, memo: dict) -> Turn:
        return self

    def __call__(self, x: Tensor, places: Tensor) -> Tensor:
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        cos, sin = self.angles(places, x.dtype)
        r = 2 * cos.shape[-1]
        start = x.shape[-1] - r if self.at_end else 0
        before, part, after = x.split([start, r, x.shape[-1] - start - r], -1)
        if self.interleaved:
            first, second = part[..., ::2], part[..., 1::2]
            pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
            return torch.cat([before, pairs.flatten(-2), after], -1)
        first, second = part.chunk(2, -1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([before, *turned, after], -1)


def turn_by(size: int, theta: float, scaling: str) -> Turn:
    """The rotation of `rotate`, by any place.

    Angles are float64 here: where a list begins is arbitrary, and rounding must not show it.
    """

    def angles(places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inverse = frequencies(size, theta, scaling, places.device).double()
        angle = places.unsqueeze(-1) * inverse
        return angle.cos().to(dtype), angle.sin().to(dtype)

    return Turn(angles)
