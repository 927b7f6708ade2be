"""Scaled step sizes: the older remedy, and its calibrated form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from statewright.policies.recurrent import Gates, RecurrentPolicy, Scan
from statewright.state import State


@dataclass(frozen=True)
class DeltaScale(RecurrentPolicy):
    """dt_t <- factor dt_t after softplus, in Mamba and Mamba-2: decay and insertion together.

    One factor for all layers (jzhang38's LongMamba), or one per recurrent layer, "0.9/0.5/0.7"
    (MambaExtend, ICLR 2025, whose calibration is `repair`'s). A smaller factor forgets and writes
    less. Raises ValueError on models without a step size, or for a wrong number of factors.

    >>> layer, x = Mamba2(8, head_dim=8), torch.randn(1, 20, 8)
    >>> y, state = layer(x, policy=DeltaScale(factor=0.5))
    >>> state.S.shape
    torch.Size([1, 2, 128, 8])
    """

    factor: float | str = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < factor < math.inf for factor in self.layer_factors):
            raise ValueError(f"deltascale: factor={self.factor}, expected numbers > 0")

    @property
    def layer_factors(self) -> list[float]:
        """One for all layers, or one for each."""
        try:
            return [float(text) for text in str(self.factor).split("/")]
        except ValueError:
            raise ValueError(
                f"deltascale: factor={self.factor!r}, expected a number, or one per layer: 0.9/0.5"
            ) from None

    def for_layer(self, layer: int, num_layers: int) -> DeltaScale:
        factors = self.layer_factors
        if len(factors) == 1:
            return self
        if len(factors) != num_layers:
            raise ValueError(
                f"deltascale: {len(factors)} factors, but the model has {num_layers} layers "
                "with a linear recurrence"
            )
        return replace(self, factor=factors[layer])

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        if not gates.has_delta:
            raise ValueError("deltascale: only Mamba and Mamba-2 have a step size; use forgetmore")
        if len(self.layer_factors) != 1:
            raise ValueError(
                f"deltascale: factor={self.factor!r} is for the layers of a model, expected one "
                "number for one layer"
            )
        (factor,) = self.layer_factors
        return next_scan(replace(gates, v=gates.v * factor, log_a=gates.log_a * factor), state)
