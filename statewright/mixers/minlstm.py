"""minLSTM (Feng et al., "Were RNNs All We Needed?", arXiv:2410.01201)."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from statewright.mixers.mingru import Form, MinimalMixer
from statewright.ops import native
from statewright.state import VectorState


class MinLSTM(MinimalMixer):
    """f, i = sigmoid(W_f x), sigmoid(W_i x); h~ = W_h x; h_t = f' h_{t-1} + i' h~_t (sec. 3.2).

    f' = f/(f+i) and i' = i/(f+i) with `normalize` (the paper's equations: the output scale does
    not depend on time); f' = f and i' = i without (the authors' released default).
    x, y (B, T, D); state h (B, inner). `forget_bias` is added to f's initial bias: 3 in the
    authors' configurations, which speeds up and stabilises training. Otherwise as MinGRU.

    >>> y, state = MinLSTM(8)(torch.randn(2, 5, 8))
    >>> state
    VectorState(seen (2,), h (2, 8); 80 bytes)
    """

    def __init__(
        self,
        hidden_size: int,
        expansion: float = 1.0,
        form: Form = "log",
        normalize: bool = True,
        learned_init: bool = True,
        forget_bias: float = 3.0,
        bias: bool = True,
    ) -> None:
        self.forget_bias = forget_bias
        super().__init__(hidden_size, 3, expansion, form, learned_init, bias, forget_bias)
        self.normalize = normalize

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f, i, c = self.project(x)
        if not self.normalize:
            return F.logsigmoid(f), i.sigmoid() * self.candidate(c)
        # Not softplus, which turns linear beyond 20: an error of 2e-9, seen in float64.
        balance = F.logsigmoid(i) - F.logsigmoid(f)
        return F.logsigmoid(-balance), balance.sigmoid() * self.candidate(c)

    def fused(
        self,
        p: Tensor,
        h0: Tensor,
        initial: Tensor | None,
        flags: Tensor | None,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        return native.minlstm(p, h0, initial, flags, self.form == "log", self.normalize, factors)

    def update(self, x: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
        f, i, c = self.project(x)
        forget, insert = f.sigmoid(), i.sigmoid()
        if self.normalize:
            # f / (f + i) as written is 0 / 0 once both gates underflow.
            forget = (F.logsigmoid(f) - F.logsigmoid(i)).sigmoid()
            insert = 1 - forget
        h = forget * state.h + insert * self.candidate(c)
        return self.output(h, x), replace(state, h=h)
