"""Hyena, gated long convolutions with implicit filters (Poli et al., arXiv:2302.10866)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from statewright.mixers.base import Mixer
from statewright.mixers.conv import CausalConv
from statewright.mixers.kv import empty_list, tidy
from statewright.mixers.lti import fft_conv
from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.ragged import Compaction
from statewright.shapes import require
from statewright.state import KVState, State

_TAPS, _TAPS_AXES = "taps", "batch tap channel"
_FASTEST, _SLOWEST, _LEFT = 0.3, 1.5, 1e-2


class WideLinear(nn.Module):
    """As `nn.Linear`, computed in its input's dtype. Not one, so that quantisers pass it by."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class ImplicitFilter(nn.Module):
    """h_t = window(t) * FFN(features(t)): as many filters as `channels`, of any length.

    features: t and `bands` sines and cosines of it; FFN: `depth` linear layers, sines between;
    window: exp(-rate t), the rates spread over the channels so that 1 % is left after 0.3 to 1.5
    of `length`, the number of tokens that t = 1 means (arXiv:2302.10866, sec. 3.3). Computed in a
    wider dtype than the weights': sines of sines make a rounding some thousand times larger.
    """

    def __init__(
        self, channels: int, length: int, width: int, bands: int, depth: int, frequency: float
    ) -> None:
        super().__init__()
        self.length, self.bands, self.frequency = length, bands, frequency
        sizes = [2 * bands + 1, *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(WideLinear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.last = WideLinear(sizes[-1], channels, bias=False)

    def forward(self, count: int) -> Tensor:
        """The first `count` values: (count, channels), in at least float32."""
        weight = self.last.weight
        dtype = state_dtype(weight.dtype)
        # Half precision is widened to single, the others to double where the device has it.
        wide = dtype if weight.device.type == "mps" or dtype != weight.dtype else torch.float64
        t = torch.arange(count, device=weight.device, dtype=wide).unsqueeze(1) / self.length
        angle = 2 * math.pi * t * torch.arange(self.bands, device=t.device, dtype=wide)
        x = torch.cat([t, angle.cos(), -angle.sin()], 1)
        for layer in self.hidden:
            x = (self.frequency * layer(x)).sin()
        rates = torch.linspace(
            -math.log(_LEFT) / _FASTEST, -math.log(_LEFT) / _SLOWEST, weight.shape[0]
        )
        return (self.last(x) * (-t * rates.to(t)).exp()).to(dtype)


class Hyena(Mixer):
    """v <- x_i * (h_i conv v) for i = 1 .. order, x_i and v short-convolved projections of x.

    h_i is an implicit filter as long as the past, so the state is the whole past: a KVState whose
    k (B, order, N, D) are the inputs of each long convolution, N all tokens seen, v empty; the
    short convolution's taps in `extra`. Nothing bounds it. `forward` is by FFT, `step` a sum over
    the past. x, y (B, T, D). arXiv:2302.10866, definition 3.1. Differs from the authors' code:
    filters go on beyond `filter_length`, which only sets their scale, so any length can follow.

    >>> y, state = Hyena(8)(torch.randn(2, 5, 8))
    >>> state.k.shape
    torch.Size([2, 2, 5, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        order: int = 2,
        filter_length: int = 1024,
        filter_width: int = 64,
        bands: int = 8,
        depth: int = 4,
        frequency: float = 14.0,
        conv_kernel: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("order", order), ("filter_length", filter_length), ("depth", depth)):
            if value < 1:
                raise ValueError(f"hyena: {name}={value}, expected at least 1")
        self.hidden_size, self.order = hidden_size, order
        self.in_proj = nn.Linear(hidden_size, (order + 1) * hidden_size)
        self.conv = CausalConv((order + 1) * hidden_size, conv_kernel)
        self.filter = ImplicitFilter(
            order * hidden_size, filter_length, filter_width, bands, depth, frequency
        )
        self.skip = nn.Parameter(torch.empty(order, hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.skip)

    def init_state(self, batch_size: int) -> KVState:
        like = self.like
        state = empty_list(batch_size, self.order, self.hidden_size, 0, like.dtype, like.device)
        return state.with_extra(_TAPS, self.conv.init_taps(batch_size), _TAPS_AXES)

    def random_state(self, batch_size: int, generator: torch.Generator) -> KVState:
        seen = torch.randint(1, 9, (batch_size,), generator=generator)
        state, N = self.init_state(batch_size), int(seen.max())
        k = torch.randn(batch_size, self.order, N, self.hidden_size, generator=generator)
        pos = torch.arange(N).expand(batch_size, self.order, N)
        pos = torch.where(pos < seen.view(-1, 1, 1), pos, -1)
        taps = torch.randn(state.extra[_TAPS].shape, generator=generator)
        state = replace(
            state,
            k=k.masked_fill((pos < 0).unsqueeze(-1), 0).to(state.k),
            v=k[..., :0].to(state.v),
            pos=pos.to(state.pos),
            seen=seen.to(state.seen),
        )
        return state.with_extra(_TAPS, taps.to(state.k), _TAPS_AXES)

    def check(self, state: State, batch_size: int) -> None:
        if not isinstance(state, KVState) or _TAPS not in state.extra:
            raise ValueError(f"Hyena: state is {state!r}, expected a KVState with {_TAPS!r}")
        sizes = {"B": batch_size, "order": self.order, "D": self.hidden_size}
        require("Hyena", "state.k", state.k, "B order N D", **sizes)

    def step(
        self,
        x: Tensor,
        state: State,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | None = None,
    ) -> tuple[Tensor, State]:
        """The definition, one token: every long convolution is a sum over the past."""
        B, _ = require("Hyena", "x", x, "B D", D=self.hidden_size)
        self.check(state, B)
        active = torch.ones_like(state.seen, dtype=torch.bool) if mask is None else mask
        pos, seen, old_taps = state.pos, state.seen, state.extra[_TAPS]
        if reset is not None:
            starts = reset & active
            pos, seen = pos.masked_fill(starts.view(-1, 1, 1), -1), seen.masked_fill(starts, 0)
            old_taps = old_taps.masked_fill(starts.view(-1, 1, 1), 0)
        parts, taps = self.conv.update(self.in_proj(x), old_taps)
        v, *gates = parts.chunk(self.order + 1, -1)
        h = self.filter(int(seen.max()) + 1).unflatten(1, (self.order, -1))
        inputs = []
        for i, gate in enumerate(gates):
            inputs.append(v)
            lags = (seen.unsqueeze(1) - pos[:, i]).clamp(max=h.shape[0] - 1)
            past = h[lags, i] * state.k[:, i].to(h.dtype) * (pos[:, i] >= 0).unsqueeze(-1)
            wide = v.to(h.dtype)
            v = gate * (past.sum(1) + h[0, i] * wide + self._skip(i, wide)).to(x.dtype)
        new = torch.where(active, seen, -1).view(-1, 1, 1).expand(-1, self.order, 1)
        k = torch.cat([state.k, torch.stack(inputs, 1).unsqueeze(2).to(state.k)], 2)
        pos = torch.cat([pos, new], 2)
        taps = torch.where(active.view(-1, 1, 1), taps, old_taps)
        return self.out_proj(v), self._tidied(state, k, pos, seen + active, taps)

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        return True

    def run(
        self,
        x: Tensor,
        state: KVState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        T = x.shape[1]
        if T == 1:
            return super().run(x, state, mask, starts, policy)
        parts, taps = self.conv(self.in_proj(x), state.extra[_TAPS], mask, starts)
        rows = None if mask is None else Compaction.of(mask)
        if rows is not None:
            parts = rows.pack(parts)
            starts = None if starts is None else rows.pack(starts)
        lengths = torch.full_like(state.seen, T) if rows is None else rows.lengths
        v, k, pos, seen = self._in_pieces(parts, state, lengths, starts)
        v = v if rows is None else rows.unpack(v)
        return self.out_proj(v), self._tidied(state, k, pos, seen, taps)

    def _in_pieces(
        self, parts: Tensor, state: KVState, lengths: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Piece by piece between the tokens at which some row starts afresh."""
        k, pos, seen, cuts, outputs = state.k, state.pos, state.seen, [0], []
        if starts is not None:
            cuts += (starts[:, 1:].any(0).nonzero() + 1).flatten().tolist()
        for begin, end in zip(cuts, [*cuts[1:], parts.shape[1]]):
            if starts is not None:
                now = starts[:, begin]
                pos, seen = pos.masked_fill(now.view(-1, 1, 1), -1), seen.masked_fill(now, 0)
            left = (lengths - begin).clamp(0, end - begin)
            at = torch.arange(end - begin, device=seen.device)
            new = torch.where(at < left.unsqueeze(1), seen.unsqueeze(1) + at, -1)
            pos = torch.cat([pos, new.unsqueeze(1).expand(-1, self.order, -1)], 2)
            v, k = self._convolve(parts[:, begin:end], k, pos)
            outputs.append(v)
            seen = seen + left
        return torch.cat(outputs, 1), k, pos, seen

    def _convolve(self, parts: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """All orders over these tokens, each laid out on a line by position with its past."""
        v, *gates = parts.chunk(self.order + 1, -1)
        T, size = v.shape[1], int(pos.max()) + 1 if pos.numel() else 1
        h, inputs = self.filter(max(size, 1)).unflatten(1, (self.order, -1)), []
        # One place beyond the line takes what has no position.
        index = torch.where(pos >= 0, pos, size)
        for i, gate in enumerate(gates):
            inputs.append(v)
            wide = torch.cat([k[:, i], v.to(k)], 1).to(h.dtype)
            at = index[:, i].unsqueeze(-1).expand_as(wide)
            line = wide.new_zeros(wide.shape[0], size + 1, wide.shape[2]).scatter(1, at, wide)
            y = fft_conv(line[:, :size].mT, h[:, i].mT).mT
            y = torch.nn.functional.pad(y, (0, 0, 0, 1)).gather(1, at[:, -T:])
            v = gate * (y + self._skip(i, wide[:, -T:])).to(v.dtype)
        return v, torch.cat([k, torch.stack(inputs, 1).to(k)], 2)

    def _skip(self, i: int, v: Tensor) -> Tensor:
        return self.skip[i].to(v.dtype) * v

    def _tidied(
        self, state: KVState, k: Tensor, pos: Tensor, seen: Tensor, taps: Tensor
    ) -> KVState:
        new = tidy(state, k, k[..., :0], pos, seen, pos >= 0, {})
        return new.with_extra(_TAPS, taps, _TAPS_AXES)
