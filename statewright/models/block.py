"""One layer of the decoder: convolution, mixer and MLP, each behind a residual."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from statewright.mixers import Attention, CausalConv, Mixer, build_mixer
from statewright.models.config import StatewrightConfig
from statewright.policies import (
    Chain,
    Policy,
    StateNorm,
    build_policy,
    eviction_of,
    policy_spec,
    recurrent_parts,
)
from statewright.shapes import require
from statewright.state import State

_TAPS, _TAPS_AXES = "block_taps", "batch tap channel"


class Block(GradientCheckpointingLayer, Mixer):
    """x += conv(x); x += mixer(norm(x)); x += mlp(norm(x)): the minimal-RNN papers' LM block.

    Conv and MLP are left out when the config's conv_kernel or mlp_ratio is 0. A Block is a Mixer
    itself: its state is its mixer's, with the convolution's taps in `extra`. The order follows
    the authors' released code (no norm before the convolution); the MLP is the paper's two
    linear layers with GELU, where the release has GEGLU.
    """

    def __init__(self, config: StatewrightConfig, layer: int) -> None:
        super().__init__()
        D = self.hidden_size = config.hidden_size
        self.conv = CausalConv(D, config.conv_kernel) if config.conv_kernel else None
        self.norm = make_norm(config)
        self.mixer = build_mixer(config.mixer_of(layer), D)
        self.mlp_norm = make_norm(config) if config.mlp_width else None
        self.mlp = make_mlp(config) if config.mlp_width else None
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> State:
        state = self.mixer.init_state(batch_size)
        if self.conv is None:
            return state
        return state.with_extra(_TAPS, self.conv.init_taps(batch_size), _TAPS_AXES)

    def random_state(self, batch_size: int, generator: torch.Generator) -> State:
        state = self.mixer.random_state(batch_size, generator)
        if self.conv is None:
            return state
        taps = self.conv.init_taps(batch_size)
        taps = torch.randn(taps.shape, generator=generator).to(taps)
        return state.with_extra(_TAPS, taps, _TAPS_AXES)

    def check(self, state: State, batch_size: int) -> None:
        self.mixer.check(state, batch_size)
        if self.conv is None:
            return
        if _TAPS not in state.extra:
            raise ValueError(f"Block: state is {state!r}, expected extra {_TAPS!r} (conv taps)")
        sizes = {"B": batch_size, "tap": self.conv.width - 1, "D": self.hidden_size}
        require("Block", f"state's {_TAPS}", state.extra[_TAPS], "B tap D", **sizes)

    def step(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, State]:
        B, _ = require("Block", "x", x, "B D", D=self.hidden_size)
        self.check(state, B)
        inner = state
        if self.conv is not None:
            old = state.extra[_TAPS]
            if reset is not None:
                starts = reset if mask is None else reset & mask
                old = torch.where(starts.view(-1, 1, 1), self.conv.init_taps(B), old)
            y, taps = self.conv.update(x, old)
            if mask is not None:
                taps = torch.where(mask.view(-1, 1, 1), taps, old)
            x = x + self.dropout(y)
            inner = state.without_extra(_TAPS)
        y, inner = self.mixer.step(self.norm(x), inner, mask, reset, policy)
        if self.conv is not None:
            inner = inner.with_extra(_TAPS, taps, _TAPS_AXES)
        return self._mlp(x + self.dropout(y)), inner

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, State]:
        """As `Mixer.forward`. donate: see `Attention.forward`; other mixers save nothing by it."""
        state = inner = self.begin(x, state, mask, reset)
        if self.conv is not None:
            y, taps = self.conv(x, state.extra[_TAPS], mask, reset)
            x = x + self.dropout(y)
            inner = state.without_extra(_TAPS)
        options = {"donate": True} if donate and isinstance(self.mixer, Attention) else {}
        y, inner = self.mixer(self.norm(x), inner, mask, reset, policy, **options)
        if self.conv is not None:
            inner = inner.with_extra(_TAPS, taps, _TAPS_AXES)
        return self._mlp(x + self.dropout(y)), inner

    def _mlp(self, x: Tensor) -> Tensor:
        return x if self.mlp is None else x + self.dropout(self.mlp(self.mlp_norm(x)))


def layer_policies(
    blocks: Iterable[nn.Module],
    policy: Policy | str | None,
    norms: tuple[Tensor, ...] | None = None,
) -> list[Policy | None]:
    """Each block's own policy: lists share the part that evicts, linear recurrences the others.

    norms: the heads' norms at the training length, for a `StateNorm` whose limit is a multiple.
    Raises ValueError for a recurrent policy on a model without a linear recurrence.
    """
    chosen = build_policy(policy)
    mixers = [block.mixer for block in blocks]
    if chosen is None:
        return [None] * len(mixers)
    eviction, parts = eviction_of(chosen), recurrent_parts(chosen)
    lists = [isinstance(mixer, Attention) for mixer in mixers]
    linear = [mixer.is_linear for mixer in mixers]
    if parts and not any(linear):
        raise ValueError(
            f"policy {policy_spec(chosen)}: no layer of this model is a linear recurrence "
            "(Mamba-2, GLA, Mamba, minGRU, minLSTM)"
        )
    measured = [
        replace(part, norms=norms) if isinstance(part, StateNorm) and part.needs_norms else part
        for part in parts
    ]
    own: list[Policy | None] = []
    for i in range(len(mixers)):
        if lists[i]:
            place = sum(lists[:i]), sum(lists)
            own.append(None if eviction is None else eviction.for_layer(*place))
        elif linear[i] and parts:
            place = sum(linear[:i]), sum(linear)
            own.append(Chain(tuple(part.for_layer(*place) for part in measured)))
        else:
            own.append(None)
    return own


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), without biases (Shazeer, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, inner_size, bias=False)
        self.up = nn.Linear(hidden_size, inner_size, bias=False)
        self.down = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make_mlp(config: StatewrightConfig) -> nn.Module:
    D, inner = config.hidden_size, config.mlp_width
    if config.mlp == "swiglu":
        return SwiGLU(D, inner)
    if config.mlp != "gelu":
        raise ValueError(f"config: mlp={config.mlp!r}, expected 'gelu' or 'swiglu'")
    return nn.Sequential(nn.Linear(D, inner), nn.GELU(), nn.Linear(inner, D))


def make_norm(config: StatewrightConfig) -> nn.Module:
    kinds = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
    if config.norm not in kinds:
        raise ValueError(f"config: norm={config.norm!r}, expected one of {sorted(kinds)}")
    return kinds[config.norm](config.hidden_size, eps=config.norm_eps)
