"""What growing or shrinking a mixer's state means; each mixer says how in its own file."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.matrix import MatrixMixer
from statewright.ops import matrix_scan

_PIECE = 64
FRESH, ZERO = -1, -2


class Resizable(Protocol):
    """What a mixer offers to `statewright.models.resize`.

    GROWTHS: the initialisations of what is new, a function-preserving one first.
    RESETS_NORM: those that start the mixer afresh, so that the norm before it is reset as well.
    SHRINKS: what can be left out, "key" (or channels) and "heads".
    """

    GROWTHS: ClassVar[tuple[str, ...]]
    RESETS_NORM: ClassVar[tuple[str, ...]]
    SHRINKS: ClassVar[tuple[str, ...]]

    def grown(self, factor: Fraction, init: str) -> dict[str, Any]:
        """The options, changed to a state `factor` > 1 times as large. ValueError if impossible."""

    def inherit(self, old: Resizable, init: str) -> None:
        """Take a smaller mixer's weights; this one is new, what is not taken stays as it is."""

    def shrunk(self, factor: Fraction, part: str) -> dict[str, Any]:
        """The options, changed to `factor` < 1 times the keys of a head (or channels, or heads)."""

    def energy(self, x: Tensor, part: str) -> Tensor:
        """What each key, channel or head adds to the output on x (B, T, D): (groups, keys)."""

    def keep(self, old: Resizable, kept: Tensor, part: str) -> None:
        """Take those keys, channels or heads (groups, fewer) of a larger mixer."""


def scaled(where: str, what: str, size: int, factor: Fraction) -> int:
    """size x factor, which must be a whole number from 1 on."""
    found = size * factor
    if found.denominator != 1 or found < 1:
        raise ValueError(
            f"{where}: {size} {what} x {float(factor):g} is {float(found):g}, "
            "expected a whole number from 1 on"
        )
    return int(found)


def share_of(where: str, what: str, size: int, width: int) -> float:
    """The option that makes int(width x option) this size."""
    share = size / width
    if int(width * share) != size:
        raise ValueError(f"{where}: no share of {width} gives exactly {size} {what}")
    return share


def sources(old: int, new: int, init: str) -> tuple[Tensor, Tensor]:
    """For each new key the old one it takes over, or FRESH or ZERO: of k (B), then of q (C).

    With q at zero and k at random the function is preserved and both learn. With both at zero
    neither ever gets a gradient, and copies get the same gradients for ever.
    """
    first = torch.full((new,), FRESH)
    if init == "copy":
        return torch.arange(new) % old, torch.arange(new) % old
    if init in ("fresh", "as-released"):
        return first, first
    first[:old] = torch.arange(old)
    silent = torch.where(first == FRESH, ZERO, first)
    return (silent if init == "zero-zero" else first), silent


def in_groups(source: Tensor, groups: int, old: int) -> Tensor:
    """Sources within a group, (keys) or (groups, keys), to sources among all groups' keys."""
    offset = torch.arange(groups).unsqueeze(1) * old
    return torch.where(source >= 0, source + offset, source.expand(groups, -1)).flatten()


def after(offset: int, source: Tensor) -> Tensor:
    """The same sources behind `offset` other rows."""
    return torch.where(source >= 0, source + offset, source)


@torch.no_grad()
def take(new: Tensor | None, old: Tensor | None, source: Tensor, zeros: bool = True) -> None:
    """new[i] = old[source[i]]; 0 where ZERO (unless not `zeros`), left alone where FRESH."""
    if new is None:
        return
    found = source >= 0
    new[found] = old[source[found]]
    if zeros:
        new[source == ZERO] = 0


@torch.no_grad()
def copy_rest(new: nn.Module, old: nn.Module, *but: str) -> None:
    """Parameters of the same name and shape, those that begin with one of `but` left out."""
    theirs = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if not name.startswith(but):
            parameter.copy_(theirs[name])


@torch.no_grad()
def key_energy(mixer: MatrixMixer, x: Tensor) -> Tensor:
    """E[q_k^2] ||S_k||^2 per key k: x (B, T, D) -> (G, K), summed over a group's heads.

    An estimate of what key k adds to the outputs, with S taken at the end of every 64 tokens;
    rows start from an empty state.
    """
    state = mixer.init_state(x.shape[0])
    u, rest = mixer.project(x)
    if mixer.conv is not None:
        u = F.silu(mixer.conv(u, state.extra["taps"])[0])
    q, k, v, log_a = (t.to(state.S.dtype) for t in mixer.gates(u, rest))
    S, total = state.S, 0.0
    for begin in range(0, x.shape[1], _PIECE):
        piece = slice(begin, begin + _PIECE)
        _, S = matrix_scan(q[:, piece], k[:, piece], v[:, piece], log_a[:, piece], S)
        read = q[:, piece].square().sum(1)
        written = S.square().sum(-1).unflatten(1, (q.shape[2], -1)).sum(2)
        total = total + (read * written).sum(0)
    return total
