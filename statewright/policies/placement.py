"""Where kept tokens stand when they are attended to: as they were, renumbered, or compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("original", "renumbered", "compressed")
_LONG_GAP = 10
# Later than any position: sorts entries of a later segment behind those of an earlier one.
_SEGMENT = 1 << 40


def check_mode(mode: str, label: str) -> str:
    """The mode itself; ValueError if there is no such mode."""
    if mode not in MODES:
        raise ValueError(f"{label}: positions={mode!r}, expected one of {', '.join(MODES)}")
    return mode


@dataclass(frozen=True)
class Placement:
    """Positions that depend on what is kept; keys are stored un-rotated and turned when read.

    mode "renumbered": a token's place is its rank among the kept ones, the query's too
    (StreamingLLM, arXiv:2309.17453, sec. 3.2). "compressed": the first kept token stands at 0 and
    a gap g between neighbours becomes g if g <= 10, else ln(ln g) (arXiv:2401.06104, sec. 7.2;
    literal, so a gap of 11 is shorter than one of 10; the authors' code for it is not released).
    turn(x (B, H, N, Dh), places (B, H, N)) rotates x, in at least float32. Both modes leave tokens
    where they were until one between them has left.
    """

    mode: str
    turn: Callable[[Tensor, Tensor], Tensor]

    def places(self, pos: Tensor, segment: Tensor | None = None) -> Tensor:
        """pos (B, H, N), -1 for none, segments alike -> places (B, H, N) in float64, 0 for none."""
        filled = pos >= 0
        key = pos if segment is None else torch.where(filled, pos + segment * _SEGMENT, -1)
        key, order = key.sort(dim=-1, stable=True)
        if self.mode == "renumbered":
            count = torch.arange(pos.shape[-1], device=pos.device)
            at = (count - (~filled).sum(-1, keepdim=True)).to(torch.float64)
        else:
            gap = (key[..., 1:] - key[..., :-1]).clamp(min=1).to(torch.float64)
            step = torch.where(gap > _LONG_GAP, gap.clamp(min=_LONG_GAP).log().log(), gap)
            step = step.masked_fill(key[..., :-1] < 0, 0)
            at = torch.cat([step.new_zeros(*pos.shape[:2], min(pos.shape[-1], 1)), step], -1)
            at = at.cumsum(-1)
        return torch.zeros_like(at).scatter_(-1, order, at).masked_fill(~filled, 0)
