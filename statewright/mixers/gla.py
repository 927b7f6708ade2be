"""Gated linear attention (Yang et al., arXiv:2312.06635)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.conv import CausalConv
from statewright.mixers.matrix import MatrixMixer, ScanInputs

_FEATURES = {"none": lambda x: x, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "silu": F.silu}


class GLA(MatrixMixer):
    """S = diag(a) S + k v^T, o = (q / sqrt(K)) S; log a = logsigmoid(W2 W1 x + b) / 16.

    x, y (B, T, D); state S (B, H, K, V), K = D expand_k / H, V = D expand_v / H. RMSNorm per
    head, SiLU output gate, projection (sec. 4.2). Optional short convolution with SiLU over
    [q | k | v], optional feature map on q and k. Projections start Xavier-uniform with gain
    2^-2.5, as the authors' (flash-linear-attention's model classes no longer do).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        conv_kernel: int = 0,
        conv_bias: bool = False,
        feature_map: Literal["none", "relu", "elu", "silu"] = "none",
        output_gate: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.keys, self.values = int(hidden_size * expand_k), int(hidden_size * expand_v)
        if self.keys % num_heads or self.values % num_heads or not self.keys:
            raise ValueError(
                f"gla: num_heads={num_heads} does not divide {self.keys} keys, {self.values} values"
            )
        if feature_map not in _FEATURES:
            raise ValueError(f"gla: feature_map={feature_map!r}, expected {sorted(_FEATURES)}")
        self.key_size, self.value_size = self.keys // num_heads, self.values // num_heads
        self.gate_normalizer, self.feature_map = gate_normalizer, feature_map
        self.q_proj = nn.Linear(hidden_size, self.keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_rank, bias=False), nn.Linear(gate_rank, self.keys)
        )
        self.g_proj = nn.Linear(hidden_size, self.values, bias=False) if output_gate else None
        self.o_proj = nn.Linear(self.values, hidden_size, bias=False)
        self.g_norm = nn.RMSNorm(self.value_size, eps=eps)
        channels = 2 * self.keys + self.values
        self.conv = CausalConv(channels, conv_kernel, bias=conv_bias) if conv_kernel else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and not getattr(weight, "_is_hf_initialized", False):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        u = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        return u, (self.gk_proj(x), None if self.g_proj is None else self.g_proj(x))

    def gates(self, u: Tensor, rest: tuple[Tensor, Tensor | None]) -> ScanInputs:
        q, k, v = u.split([self.keys, self.keys, self.values], -1)
        feature = _FEATURES[self.feature_map]
        gk = rest[0]
        log_a = F.logsigmoid(gk.to(torch.promote_types(gk.dtype, torch.float32)))
        heads = (self.num_heads, -1)
        q = feature(q.unflatten(-1, heads)) * self.key_size**-0.5
        k = feature(k.unflatten(-1, heads))
        log_a = (log_a / self.gate_normalizer).unflatten(-1, heads)
        return q, k, v.unflatten(-1, heads), log_a

    def output(self, o: Tensor, u: Tensor, rest: tuple[Tensor, Tensor | None]) -> Tensor:
        y = self.g_norm(o).flatten(-2)
        if rest[1] is not None:
            y = y * F.silu(rest[1])
        return self.o_proj(y)
