"""State normalisation: a head's state is rescaled where its norm exceeds a limit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from statewright.policies.recurrent import Gates, RecurrentPolicy, Scan, carried, with_carried
from statewright.state import State

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass(frozen=True)
class StateNorm(RecurrentPolicy):
    """S_t <- S_t min(1, limit / |S_t|), Frobenius norm per head, at every `every`-th token.

    Stuffed Mamba, arXiv:2410.07145 v1 (its formula is known from secondary sources only). What is
    read at such a token is the rescaled state. A vector state is one head; Mamba's are its
    channels. limit: a norm, or "2x", a multiple of each head's norm at the training length
    (`norms`, one tensor (H,) per layer, measured by `models.calibration`). Exact per token at
    every=1, which is sequential. Differs from the authors' code: it scales down, not up; outputs
    see the rescaled state; and the state carried is the rescaled one.

    >>> layer, x = MinGRU(8), torch.randn(1, 20, 8)
    >>> y, state = layer(x, policy=StateNorm(limit=0.5, every=1))
    >>> bool(state.h.norm() < 0.501)
    True
    """

    limit: float | str = "1x"
    every: int = field(default=64, kw_only=True, metadata={"least": 1})
    norms: tuple[Tensor, ...] | None = field(
        default=None, kw_only=True, compare=False, repr=False, metadata={"spec": False}
    )
    _value: tuple[float, bool] = field(
        init=False, compare=False, repr=False, metadata={"spec": False}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = str(self.limit).strip().lower()
        match = _MULTIPLE.fullmatch(given)
        try:
            value = float(match[1] if match else given)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise ValueError(
                f"statenorm: limit={self.limit!r}, expected a norm > 0 or a multiple such as '2x'"
            )
        object.__setattr__(self, "_value", (value, match is not None))

    @property
    def needs_norms(self) -> bool:
        """Whether the limit is a multiple of norms that have to be measured."""
        return self._value[1] and self.norms is None

    def for_layer(self, layer: int, num_layers: int) -> StateNorm:
        if self.norms is None:
            return self
        if len(self.norms) != num_layers:
            raise ValueError(
                f"statenorm: norms of {len(self.norms)} layers, but the model has {num_layers} "
                "layers with a linear recurrence"
            )
        return replace(self, norms=(self.norms[layer],))

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        counts = gates.counts()
        due = counts % self.every == 0
        if gates.mask is not None:
            due = due & gates.mask
        ends = sorted({*(due.any(0).nonzero()[:, 0] + 1).tolist(), gates.length})
        outputs = []
        for begin, end in zip([0, *ends], ends):
            o, state = next_scan(gates.piece(begin, end, counts), state)
            rows = due[:, end - 1]
            if bool(rows.any()):
                last, state = self._rescale(o[:, -1:], state, rows)
                outputs += [o[:, :-1], last]
            else:
                outputs.append(o)
        return torch.cat(outputs, 1), state

    def _rescale(self, last: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        """Rows that are due: what was read at the last token, (B, 1, ...), and the state."""
        value = carried(state)
        axes = tuple(range(1 if value.dim() == 2 else 2, value.dim()))
        norm = value.square().sum(axes, keepdim=True).sqrt()
        scale = (self._limit(norm) / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
        scale = torch.where(rows.view(-1, *[1] * (norm.dim() - 1)), scale, 1)
        read = scale.view(last.shape[0], 1, *scale.shape[1 : last.dim() - 1])
        return last * read.to(last.dtype), with_carried(state, value * scale)

    def _limit(self, norm: Tensor) -> Tensor | float:
        value, multiple = self._value
        if not multiple:
            return value
        if self.norms is None:
            raise ValueError(
                f"statenorm: limit={self.limit} is a multiple of norms at the training length, "
                "which this model has no record of; measure them (`statewright repair`, "
                "models.calibration.calibrate) or give the limit as a number"
            )
        measured = self.norms[0].to(norm)
        return value * measured.view(1, *norm.shape[1:])
