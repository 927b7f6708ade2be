"""Forget more and remember less, training-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from statewright.policies.recurrent import Gates, RecurrentPolicy, Scan
from statewright.state import State


@dataclass(frozen=True)
class ForgetMore(RecurrentPolicy):
    """S_t = (decay a_t) S_{t-1} + write k_t v_t^T (Stuffed Mamba, arXiv:2410.07145, sec. 5.1).

    decay in (0, 1] is added as ln(decay) to the log-decay, after softplus; only the inserted term
    is scaled by `write` (> 0), neither a skip connection nor what is read. The horizon
    1 / (1 - decay), in tokens, wants to be near the training length: the paper's 0.9999 and 0.75
    are for 8K tokens. The authors' single-step code leaves the decay out; here it is one path.

    >>> layer, x = MinGRU(8), torch.randn(1, 20, 8)
    >>> y, state = layer(x, policy=ForgetMore(decay=0.9))
    >>> state
    VectorState(seen (1,), h (1, 8); 40 bytes)
    """

    decay: float = 0.9999
    write: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"forgetmore: decay={self.decay}, expected 0 < decay <= 1")
        if not 0 < self.write < math.inf:
            raise ValueError(f"forgetmore: write={self.write}, expected a number > 0")

    @property
    def factors(self) -> tuple[float, float]:
        return self.decay, self.write

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        v = gates.v if self.write == 1 else gates.v * self.write
        return next_scan(replace(gates, v=v, log_a=gates.log_a + math.log(self.decay)), state)
