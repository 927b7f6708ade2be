"""A sliding window over what a recurrent state holds, by state difference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright.ops import matrix_scan, vector_scan
from statewright.policies.base import MARK
from statewright.policies.recurrent import (
    Gates,
    RecurrentPolicy,
    Scan,
    carried,
    restarted,
    with_carried,
)
from statewright.ragged import Compaction
from statewright.state import State

_AXES = {
    "k": "batch window group key",
    "v": "batch window head value",
    "log_a": "batch window head decay",
}
_VECTOR_AXES = {"v": "batch window channel", "log_a": "batch window channel"}


@dataclass(frozen=True)
class StateWindow(RecurrentPolicy):
    """Read S_t - (a_{t-r+1} ... a_t) S_{t-r}, r = length: the last r tokens of the layer's input.

    Stuffed Mamba, arXiv:2410.07145, sec. 5.1; equal to a banded decay mask, layer by layer, so L
    layers with convolutions see L (r + 2) tokens. The recurrence that is carried stays un-windowed.
    The last r (k, v, log decay) stand in the state's `extra`: r (K + V + 1) numbers per head,
    dearer than the state itself for r above about K V / (K + V). The authors keep token ids and a
    lagged copy of the model, which is inexact above the first layer. The two states of the
    difference restart every r tokens, so nothing drifts. Tokens read before the policy was switched
    on are outside the window.

    >>> layer, x = MinGRU(8, learned_init=False), torch.randn(1, 20, 8)
    >>> windowed, alone = layer(x, policy=StateWindow(length=4))[0], layer(x[:, -4:])[0]
    >>> torch.allclose(windowed[:, -1], alone[:, -1], atol=1e-5)
    True
    """

    length: int = field(default=1024, metadata={"least": 1})
    innermost: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ValueError(f"statewindow: length={self.length}, expected at least 1 token")

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        gates, starts = _merged(gates, state)
        rows = None if gates.mask is None else Compaction.of(gates.mask)
        gates = gates.inert()
        names = ("k", "v", "log_a", "q")
        tokens = {name: t for name in names if (t := getattr(gates, name)) is not None}
        if rows is not None:
            tokens = {name: rows.pack(tensor) for name, tensor in tokens.items()}
            starts = None if starts is None else rows.pack(starts)
        q = tokens.pop("q", None)
        ring = self._ring(tokens, state)
        joined = {name: torch.cat([ring[name], tensor], 1) for name, tensor in tokens.items()}
        cut = joined if starts is None else {**joined, "log_a": self._cut(joined["log_a"], starts)}
        read = self._single if gates.length == 1 else self._blocks
        o, S = read(q, cut, carried(state))
        lengths = None if rows is None else rows.lengths
        state = self._remember(with_carried(state, S), joined, starts, lengths)
        return (o if rows is None else rows.unpack(o)), state

    def _ring(self, tokens: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """The last r tokens before these, oldest first; tokens never read insert nothing."""
        ring = {}
        for name, tensor in tokens.items():
            kept = state.extra.get(_name(name))
            if kept is None or kept.shape[1] != self.length:
                kept = tensor.new_zeros(tensor.shape[0], self.length, *tensor.shape[2:])
            ring[name] = kept.to(tensor.dtype)
        return ring

    def _cut(self, log_a: Tensor, starts: Tensor) -> Tensor:
        """Resets as decays of 0."""
        cut = F.pad(starts, (self.length, 0))
        return log_a.masked_fill(_like(cut, log_a), -torch.inf)

    def _remember(
        self,
        state: State,
        joined: dict[str, Tensor],
        starts: Tensor | None,
        lengths: Tensor | None,
    ) -> State:
        """The last r tokens of every row into `extra`, nothing from before its last reset."""
        axes = _VECTOR_AXES if carried(state).dim() == 2 else _AXES
        at = joined["v"].shape[1] - self.length if lengths is None else lengths.unsqueeze(1)
        index = at + torch.arange(self.length, device=joined["v"].device)
        gone = None
        if starts is not None:
            place = torch.arange(starts.shape[1], device=starts.device)
            last = torch.where(starts, place, -self.length).amax(1, keepdim=True)
            gone = index < last + self.length
        for name, tensor in joined.items():
            if lengths is None:
                # A clone, since a slice would keep the whole call's tokens alive.
                kept = tensor[:, tensor.shape[1] - self.length :].clone()
            else:
                kept = torch.take_along_dim(tensor, _like(index, tensor), 1)
            if gone is not None:
                kept = kept.masked_fill(_like(gone, kept), 0)
            state = state.with_extra(_name(name), kept, axes[name])
        return state

    def _single(
        self, q: Tensor | None, joined: dict[str, Tensor], S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token: the banded sum itself, over the ring's last r - 1 tokens and this one."""
        log_a, v = joined["log_a"][:, 1:].to(S.dtype), joined["v"][:, 1:].to(S.dtype)
        # The decay of token i counts from i + 1 on: sums from the right, the own one excluded.
        later = F.pad(log_a[:, 1:], (0, 0) * (log_a.dim() - 2) + (0, 1))
        decay = later.flip(1).cumsum(1).flip(1).exp()
        if q is None:
            h = S * log_a[:, -1].exp() + v[:, -1]
            return (decay * v).sum(1, keepdim=True), h
        k, q = joined["k"][:, 1:].to(S.dtype), q[:, 0].to(S.dtype)
        groups = v.shape[2] // k.shape[2]
        scores = q.repeat_interleave(groups, 1) if log_a.shape[-1] > 1 else None
        if scores is None:
            weights = torch.einsum("bgk,bngk->bng", q, k).repeat_interleave(groups, 2)
            weights = weights * decay.squeeze(-1)
        else:
            per_head = k.repeat_interleave(groups, 2) * decay
            weights = torch.einsum("bhk,bnhk->bnh", scores, per_head)
        o = torch.einsum("bnh,bnhv->bhv", weights, v).unsqueeze(1)
        inserted = k[:, -1].repeat_interleave(groups, 1).unsqueeze(-1) * v[:, -1].unsqueeze(-2)
        return o.to(joined["v"].dtype), S * log_a[:, -1].exp().unsqueeze(-1) + inserted

    def _blocks(
        self, q: Tensor | None, joined: dict[str, Tensor], S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Many tokens, in blocks of r behind the ring's; both states restart at every block.

        With E the state of the block before and P_j the one it had at its token j, the window of
        token j of this block is: this block's own state + (decays so far) (E - later decays P_j).
        """
        r, T = self.length, joined["v"].shape[1] - self.length
        n = -(-T // r)
        blocks = {name: _in_blocks(t, r, n + 1) for name, t in joined.items()}
        if q is None:
            o, ends, total = _vector_blocks(blocks, S.dtype)
        else:
            o, ends, total = _matrix_blocks(_in_blocks(q, r, n), blocks, S.dtype)
        for block in range(1, n + 1):
            S = S * total[:, block] + ends[:, block]
        return o.flatten(1, 2)[:, :T].to(joined["v"].dtype), S


def _merged(gates: Gates, state: State) -> tuple[Gates, Tensor | None]:
    """A row's initial vector state comes in with its first token; and where rows start afresh."""
    starts = gates.reset
    gates = restarted(gates)
    if carried(state).dim() > 2:
        return gates, starts
    fresh = (gates.counts() == 1) & (gates.seen == 0).unsqueeze(1)
    if gates.mask is not None:
        fresh = fresh & gates.mask
    if starts is not None:
        fresh = fresh & (starts.cumsum(1) == 0)
    first = gates.v + gates.log_a.exp() * carried(state).unsqueeze(1)
    v = torch.where(fresh.unsqueeze(-1), first, gates.v)
    return replace(gates, v=v, initial=None), fresh if starts is None else fresh | starts


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    """(B, T) with as many axes as the tensor (B, T, ...)."""
    return flags.view(*flags.shape, *[1] * (tensor.dim() - 2))


def _vector_blocks(blocks: dict[str, Tensor], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, n - 1, r, D), the end of every block (B, n, D) and its decay (B, n, D)."""
    B, n, r, D = blocks["v"].shape
    log_a, v = (blocks[name].to(wide) for name in ("log_a", "v"))
    h, ends = _scan_blocks(log_a, v, 0.0)
    # Products of decays are a scan too, and a cheaper one than logarithms' sums and exponentials.
    so_far, total = _scan_blocks(log_a, torch.zeros_like(log_a), 1.0)
    shifted = F.pad(log_a[:, :-1].flip(2)[:, :, :-1], (0, 0, 1, 0))
    later, _ = _scan_blocks(shifted, torch.zeros_like(shifted), 1.0)
    before = ends[:, :-1].unsqueeze(2) - later.flip(2) * h[:, :-1]
    return torch.addcmul(h[:, 1:], so_far[:, 1:], before), ends, total


def _scan_blocks(log_a: Tensor, b: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """A scan of every block (B, n, r, D) by itself, from a constant."""
    B, n, _, D = log_a.shape
    h, ends = vector_scan(log_a.flatten(0, 1), b.flatten(0, 1), log_a.new_full((B * n, D), start))
    return h.unflatten(0, (B, n)), ends.unflatten(0, (B, n))


def _matrix_blocks(
    q: Tensor, blocks: dict[str, Tensor], wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, n - 1, r, H, V), the end of every block (B, n, H, K, V) and its decay."""
    k, v, log_a = blocks["k"], blocks["v"], blocks["log_a"]
    (B, n, r, H, V), K = v.shape, k.shape[-1]
    sums = log_a.to(wide)
    so_far = sums.cumsum(2)
    total = so_far[:, :, -1].exp().unsqueeze(-1)
    # From token j + 1 of the block before to its end, then up to token j of this one.
    later = sums[:, :-1].flip(2).cumsum(2).flip(2)[:, :, 1:]
    lag = F.pad(later, (0, 0, 0, 0, 0, 1)) + so_far[:, 1:]
    zero = so_far.new_zeros(B * n, H, K, V)
    padded = torch.cat([torch.zeros_like(q[:, :1]), q], 1).to(v.dtype)
    rows = [t.flatten(0, 1) for t in (padded, k.to(v.dtype), v, log_a)]
    o, ends = matrix_scan(rows[0], rows[1], rows[2], rows[3], zero)
    o, ends = o.view(B, n, r, H, V)[:, 1:], ends.view(B, n, H, K, V)
    per_key = log_a.shape[-1] > 1
    groups = H // k.shape[3]
    heads = q.repeat_interleave(groups, 3) if per_key else q
    keys = k.repeat_interleave(groups, 3) if per_key else k
    lagged = heads * lag.exp() if per_key else heads
    old, _ = matrix_scan(
        lagged.flatten(0, 1).to(v.dtype),
        keys[:, :-1].flatten(0, 1).to(v.dtype),
        v[:, :-1].flatten(0, 1),
        log_a[:, :-1].flatten(0, 1),
        zero.view(B, n, H, K, V)[:, 1:].flatten(0, 1),
    )
    old = old.view(B, n - 1, r, H, V)
    reading = (heads * so_far[:, 1:].exp() if per_key else heads).to(ends.dtype)
    split = (-1, ends.shape[2] // reading.shape[3])
    previous = ends[:, :-1].unflatten(2, split)
    whole = torch.einsum("bnrgk,bnghkv->bnrghv", reading, previous).flatten(3, 4)
    if per_key:
        return o + (whole - old), ends, total
    return o + (so_far[:, 1:].exp() * whole - lag.exp() * old), ends, total


def _in_blocks(tensor: Tensor, r: int, n: int) -> Tensor:
    """(B, n, r, ...): padded at the end by tokens that do nothing."""
    missing = n * r - tensor.shape[1]
    padded = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)) if missing else tensor
    return padded.unflatten(1, (n, r))


def _name(name: str) -> str:
    return f"{MARK}window_{name}"
