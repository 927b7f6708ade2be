"""Gated linear attention (Yang et al., arXiv:2312.06635)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statewright.mixers.conv import CausalConv
from statewright.mixers.matrix import MatrixMixer, ScanInputs
from statewright.mixers.resize import (
    after,
    copy_rest,
    in_groups,
    key_energy,
    scaled,
    share_of,
    sources,
    take,
)

_FEATURES = {"none": lambda x: x, "relu": F.relu, "elu": lambda x: F.elu(x) + 1, "silu": F.silu}


class GLA(MatrixMixer):
    """S = diag(a) S + k v^T, o = (q / sqrt(K)) S; log a = logsigmoid(W2 W1 x + b) / 16.

    x, y (B, T, D); state S (B, H, K, V), K = D expand_k / H, V = D expand_v / H. RMSNorm per
    head, SiLU output gate, projection (sec. 4.2). Optional short convolution with SiLU over
    [q | k | v], optional feature map on q and k. Projections start Xavier-uniform with gain
    2^-2.5, as the authors' (flash-linear-attention's model classes no longer do).

    >>> y, state = GLA(8)(torch.randn(2, 5, 8))
    >>> state
    MatrixState(seen (2,), S (2, 4, 1, 2); 80 bytes)
    """

    GROWTHS = ("zero", "fresh", "inherit", "as-released")
    RESETS_NORM = ("fresh", "as-released")
    SHRINKS = ("key", "heads")

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

    def grown(self, factor: Fraction, init: str) -> dict[str, Any]:
        """Fewer heads, or with `zero` more keys per head, for the same state."""
        if init != "zero":
            heads = Fraction(self.num_heads) / factor
            if heads.denominator != 1:
                raise ValueError(
                    f"gla: {float(factor):g} does not divide {self.num_heads} heads, which "
                    f"{init!r} merges; init='zero' widens the keys instead"
                )
            return {"num_heads": int(heads)}
        if not self._linear_queries:
            raise ValueError(
                "gla: zero needs queries without convolution and feature map, or it would not "
                f"preserve the function; expected one of {', '.join(self.GROWTHS[1:])}"
            )
        keys = scaled("gla", "keys", self.keys, factor)
        if keys % self.num_heads:
            raise ValueError(f"gla: {self.num_heads} heads do not divide {keys} keys")
        return {"expand_k": share_of("gla", "keys", keys, self.hidden_size)}

    @property
    def _linear_queries(self) -> bool:
        return self.conv is None and self.feature_map == "none"

    def inherit(self, old: GLA, init: str) -> None:
        """Merge heads (StateX, 2026.findings-acl.1073), or widen keys.

        fresh, as-released: the paper's, one new mixer with fewer heads (and the norm before it
        reset); nothing of `old` is used. inherit: every weight kept, the head norm's repeated.
        Neither preserves the function: the old heads' states are the diagonal blocks of the new
        one, but every query now also reads the other blocks. zero (ours): more keys per head,
        their queries at 0; preserves the function, but costs parameters.
        """
        if init == "inherit":
            copy_rest(self, old, "g_norm.")
            take(
                self.g_norm.weight,
                old.g_norm.weight,
                torch.arange(self.value_size) % old.value_size,
            )
        elif init == "zero":
            self._take(old, *sources(old.key_size, self.key_size, init))

    @torch.no_grad()
    def _take(self, old: GLA, k: Tensor, q: Tensor) -> None:
        """Rows of q, k and the gate from `old`; o is divided by sqrt(K), so old q grow with it."""
        copy_rest(self, old, "q_proj.", "k_proj.", "gk_proj.1.", "conv.")
        k, q = (in_groups(source, self.num_heads, old.key_size) for source in (k, q))
        take(self.q_proj.weight, old.q_proj.weight, q)
        take(self.k_proj.weight, old.k_proj.weight, k)
        take(self.gk_proj[1].weight, old.gk_proj[1].weight, k)
        take(self.gk_proj[1].bias, old.gk_proj[1].bias, k)
        if self.conv is not None:
            v = 2 * old.keys + torch.arange(self.values)
            channels = torch.cat([q, after(old.keys, k), v])
            take(self.conv.weight, old.conv.weight, channels)
            take(self.conv.bias, old.conv.bias, channels)
        if self._linear_queries:
            self.q_proj.weight *= (self.key_size / old.key_size) ** 0.5

    def shrunk(self, factor: Fraction, part: str) -> dict[str, Any]:
        if part == "key":
            keys = self.num_heads * scaled("gla", "keys per head", self.key_size, factor)
            return {"expand_k": share_of("gla", "keys", keys, self.hidden_size)}
        heads = scaled("gla", "heads", self.num_heads, factor)
        return {
            "num_heads": heads,
            "expand_k": share_of("gla", "keys", heads * self.key_size, self.hidden_size),
            "expand_v": share_of("gla", "values", heads * self.value_size, self.hidden_size),
        }

    @torch.no_grad()
    def energy(self, x: Tensor, part: str) -> Tensor:
        """Of keys as `key_energy`; of heads the mean square of what they add to the output."""
        if part == "key":
            return key_energy(self, x)
        added = []
        hook = self.o_proj.register_forward_pre_hook(lambda module, args: added.append(args[0]))
        try:
            self(x)
        finally:
            hook.remove()
        heads = added[0].unflatten(-1, (self.num_heads, -1))
        weight = self.o_proj.weight.unflatten(-1, (self.num_heads, -1))
        outputs = torch.einsum("bthv,dhv->bthd", heads, weight)
        return outputs.square().sum(-1).mean((0, 1)).unsqueeze(0)

    def keep(self, old: GLA, kept: Tensor, part: str) -> None:
        """Fewer keys per head, or fewer heads. Where queries cannot be rescaled, the head norm
        makes up for it."""
        if part == "key":
            self._take(old, kept, kept)
            return
        keys = torch.arange(old.keys).unflatten(0, (old.num_heads, -1))[kept[0]].flatten()
        values = torch.arange(old.values).unflatten(0, (old.num_heads, -1))[kept[0]].flatten()
        copy_rest(
            self, old, "q_proj.", "k_proj.", "gk_proj.1.", "v_proj.", "g_proj.", "o_", "conv."
        )
        for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
            mine, its = getattr(self, name), getattr(old, name)
            if mine is not None:
                take(mine.weight, its.weight, values if name in ("v_proj", "g_proj") else keys)
        take(self.gk_proj[1].weight, old.gk_proj[1].weight, keys)
        take(self.gk_proj[1].bias, old.gk_proj[1].bias, keys)
        take(self.o_proj.weight.T, old.o_proj.weight.T, values)
        if self.conv is not None:
            channels = torch.cat([keys, old.keys + keys, 2 * old.keys + values])
            take(self.conv.weight, old.conv.weight, channels)
            take(self.conv.bias, old.conv.bias, channels)
