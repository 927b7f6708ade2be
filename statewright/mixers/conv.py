"""A causal depthwise convolution over tokens that carries its taps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from statewright.ragged import Compaction


class CausalConv(nn.Module):
    """y_t = bias + sum_w weight_w * x_{t-W+1+w}, per channel: the temporal Conv4 of the papers.

    forward: x (B, T, D), taps (B, W-1, D) -> y (B, T, D), taps. The taps are the last W - 1
    unmasked inputs, oldest first, zeros before a row's first token, so any split of x gives the
    same outputs. Masked tokens do not exist for it; a reset hides everything before its token.
    """

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width={width}: a causal convolution needs at least 2 taps")
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_taps(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.width - 1, self.weight.shape[0])

    def update(self, x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        """The definition, one token: x (B, D) -> y (B, D), taps."""
        window = torch.cat([taps, x.unsqueeze(1)], 1)
        y = (window * self.weight.T).sum(1)
        return y if self.bias is None else y + self.bias, window[:, 1:]

    def forward(
        self, x: Tensor, taps: Tensor, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 1 and mask is None and reset is None:
            y, taps = self.update(x[:, 0], taps)
            return y.unsqueeze(1), taps
        if mask is None:
            return self._convolve(x, taps, reset, None)
        rows = Compaction.of(mask)
        starts = None if reset is None else rows.pack(reset & mask)
        y, taps = self._convolve(rows.pack(x), taps, starts, rows.lengths)
        return rows.unpack(y), taps

    def _convolve(
        self, x: Tensor, taps: Tensor, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        T, W = x.shape[1], self.width
        padded = torch.cat([taps, x], 1)
        segment = None
        if reset is not None:
            ids = reset.cumsum(1)
            segment = torch.cat([ids.new_zeros(ids.shape[0], W - 1), ids], 1).unsqueeze(-1)
        newest, last = padded[:, W - 1 :], self.weight[:, W - 1]
        y = newest * last if self.bias is None else torch.addcmul(self.bias, newest, last)
        for w in range(W - 1):
            term = padded[:, w : w + T]
            if segment is not None:
                term = term * (segment[:, w : w + T] == segment[:, W - 1 :])
            y.addcmul_(term, self.weight[:, w])
        return y, self._last_taps(padded, segment, lengths)

    def _last_taps(self, padded: Tensor, segment: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The W - 1 inputs before each row's end, those of an earlier segment as zeros."""
        if lengths is None:
            lengths = padded.new_full((padded.shape[0],), padded.shape[1] - self.width + 1)
        at = torch.arange(self.width - 1, device=padded.device) + lengths.long().unsqueeze(1)
        at = at.unsqueeze(-1)
        taps = torch.take_along_dim(padded, at, 1)
        if segment is None:
            return taps
        last = torch.take_along_dim(segment, lengths.long().view(-1, 1, 1) + self.width - 2, 1)
        return taps * (torch.take_along_dim(segment, at, 1) == last)
