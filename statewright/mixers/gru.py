"""GRU and LSTM, the nonlinear baselines, on torch's fused kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from statewright.mixers.base import Mixer, advance_seen, inner_size
from statewright.ops import state_dtype
from statewright.policies import Policy
from statewright.ragged import Compaction
from statewright.shapes import require
from statewright.state import State, VectorState

Pair = tuple[Tensor, ...]


class NonlinearMixer(Mixer):
    """h_t = f(h_{t-1}, x_t): no scan exists, so `forward` runs torch's fused kernel.

    The kernel knows neither masks nor resets: masked tokens are moved to the end of their row
    and packed away, and the sequence is cut where any row resets. It computes in at least
    float32, because it must carry the state in the input's dtype.
    """

    names: tuple[str, ...]

    def __init__(self, hidden_size: int, expansion: float, num_gates: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.inner_size = inner_size(hidden_size, expansion)
        # Parameters of our own, named as torch's: torch.compile refuses nn.GRU and nn.LSTM.
        size = self.inner_size
        self.weight_ih = nn.Parameter(torch.empty(num_gates * size, hidden_size))
        self.weight_hh = nn.Parameter(torch.empty(num_gates * size, size))
        self.bias_ih = nn.Parameter(torch.empty(num_gates * size))
        self.bias_hh = nn.Parameter(torch.empty(num_gates * size))
        self.reset_parameters()
        down = self.inner_size != hidden_size
        self.out_proj = nn.Linear(self.inner_size, hidden_size) if down else None

    def reset_parameters(self) -> None:
        """torch's: uniform within 1 / sqrt(inner)."""
        for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            nn.init.uniform_(parameter, -(self.inner_size**-0.5), self.inner_size**-0.5)

    def cell(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> Pair:
        """One token of the paper's equations: the next hidden tensors."""
        raise NotImplementedError

    def fused(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> tuple[Tensor, Pair]:
        """Many tokens: outputs (B, T, inner) and the last hidden tensors."""
        raise NotImplementedError

    def fused_packed(
        self, x: Tensor, sizes: Tensor, hidden: Pair, weights: list[Tensor]
    ) -> tuple[Tensor, Pair]:
        """As `fused`, on packed data with `sizes` rows at each token."""
        raise NotImplementedError

    def init_state(self, batch_size: int) -> VectorState:
        weight = self.weight_hh
        dtype = state_dtype(weight.dtype)
        zeros = [weight.new_zeros(batch_size, self.inner_size, dtype=dtype) for _ in self.names]
        seen = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return self._with(VectorState(h=zeros[0], seen=seen), tuple(zeros))

    def random_state(self, batch_size: int, generator: torch.Generator) -> VectorState:
        state = self.init_state(batch_size)
        draws = [torch.randn(state.h.shape, generator=generator).to(state.h) for _ in self.names]
        draws[0] = draws[0].tanh()
        seen = torch.randint(1, 99, (batch_size,), generator=generator).to(state.seen)
        return replace(self._with(state, tuple(draws)), seen=seen)

    def check(self, state: State, batch_size: int) -> None:
        where = type(self).__name__
        if not isinstance(state, VectorState) or not set(self.names[1:]) <= set(state.extra):
            raise ValueError(f"{where}: state is {state!r}, expected a VectorState {self.names}")
        for name, tensor in zip(self.names, self._hidden(state)):
            require(where, f"state's {name}", tensor, "B D", B=batch_size, D=self.inner_size)

    def update(self, x: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
        hidden = self.cell(x.to(state.h.dtype), self._hidden(state), self._weights(state.h.dtype))
        return self._output(hidden[0], x), self._with(state, hidden)

    def run_cuts(self, mask: Tensor | None, starts: Tensor | None) -> bool:
        return mask is not None or starts is not None

    def run(
        self,
        x: Tensor,
        state: VectorState,
        mask: Tensor | None,
        starts: Tensor | None,
        policy: Policy | None,
    ) -> tuple[Tensor, State]:
        seen = advance_seen(state.seen, x.shape[1], mask, starts)
        rows = None if mask is None else Compaction.of(mask)
        inputs = x.to(state.h.dtype)
        if rows is not None:
            inputs = rows.pack(inputs)
            starts = None if starts is None else rows.pack(starts)
        outputs, hidden = self._in_pieces(inputs, self._hidden(state), starts, rows)
        if rows is not None:
            outputs = rows.unpack(outputs)
        return self._output(outputs, x), replace(self._with(state, hidden), seen=seen)

    def _in_pieces(
        self, x: Tensor, hidden: Pair, starts: Tensor | None, rows: Compaction | None
    ) -> tuple[Tensor, Pair]:
        """Piece by piece between the tokens at which some row starts afresh."""
        weights, T = self._weights(x.dtype), x.shape[1]
        cuts = [0]
        if starts is not None:
            cuts += (starts[:, 1:].any(0).nonzero() + 1).flatten().tolist()
        outputs = []
        for begin, end in zip(cuts, [*cuts[1:], T]):
            if starts is not None:
                hidden = tuple(h.masked_fill(starts[:, begin, None], 0) for h in hidden)
            piece = x[:, begin:end]
            if rows is None:
                y, hidden = self.fused(piece, hidden, weights)
            else:
                left = (rows.lengths - begin).clamp(0, end - begin)
                y, hidden = self._packed(piece, left, hidden, weights)
            outputs.append(y)
        return torch.cat(outputs, 1), hidden

    def _packed(
        self, x: Tensor, lengths: Tensor, hidden: Pair, weights: list[Tensor]
    ) -> tuple[Tensor, Pair]:
        """Rows of unequal length, the unmasked tokens first; empty rows keep their hidden."""
        if not bool(lengths.any()):
            return x.new_zeros(*x.shape[:2], self.inner_size), hidden
        at_least_one = lengths.clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            x, at_least_one, batch_first=True, enforce_sorted=False
        )
        order = packed.sorted_indices
        data, last = self.fused_packed(
            packed.data, packed.batch_sizes, tuple(h[order] for h in hidden), weights
        )
        y, _ = nn.utils.rnn.pad_packed_sequence(
            packed._replace(data=data), batch_first=True, total_length=x.shape[1]
        )
        back = packed.unsorted_indices
        kept = (lengths > 0).unsqueeze(1)
        return y, tuple(torch.where(kept, new[back], old) for new, old in zip(last, hidden))

    def _hidden(self, state: VectorState) -> Pair:
        return (state.h, *(state.extra[name] for name in self.names[1:]))

    def _with(self, state: VectorState, hidden: Pair) -> VectorState:
        state = replace(state, h=hidden[0])
        for name, tensor in zip(self.names[1:], hidden[1:]):
            state = state.with_extra(name, tensor, "batch channel")
        return state

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        own = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return [w.to(dtype) for w in own]

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        h = h.to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h)


class GRU(NonlinearMixer):
    """r, z = sigmoid(W x + U h + b); n = tanh(W x + b + r * (U h + b)); h = (1-z) n + z h.

    Cho et al., arXiv:1406.1078, in torch's convention (z keeps the old state). x, y (B, T, D);
    state h (B, inner).

    >>> y, state = GRU(8)(torch.randn(2, 5, 8))
    >>> state
    VectorState(seen (2,), h (2, 8); 80 bytes)
    """

    names = ("h",)

    def __init__(self, hidden_size: int, expansion: float = 1.0) -> None:
        super().__init__(hidden_size, expansion, 3)

    def cell(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> Pair:
        w_ih, w_hh, b_ih, b_hh = weights
        (h,) = hidden
        r_x, z_x, n_x = torch.nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
        r_h, z_h, n_h = torch.nn.functional.linear(h, w_hh, b_hh).chunk(3, -1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * n_h).tanh()
        return ((1 - z) * n + z * h,)

    def fused(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> tuple[Tensor, Pair]:
        h0 = hidden[0].unsqueeze(0)
        y, h = torch.gru(x, h0, weights, True, 1, 0.0, self.training, False, True)
        return y, (h[0],)

    def fused_packed(
        self, x: Tensor, sizes: Tensor, hidden: Pair, weights: list[Tensor]
    ) -> tuple[Tensor, Pair]:
        h0 = hidden[0].unsqueeze(0)
        y, h = torch.gru(x, sizes, h0, weights, True, 1, 0.0, self.training, False)
        return y, (h[0],)


class LSTM(NonlinearMixer):
    """i, f, o = sigmoid(W x + U h + b); c = f c + i tanh(W x + U h + b); h = o tanh(c).

    Hochreiter and Schmidhuber (1997) with forget gate. x, y (B, T, D); state h (B, inner), the
    cell in `extra["c"]` (B, inner).

    >>> y, state = LSTM(8)(torch.randn(2, 5, 8))
    >>> state
    VectorState(seen (2,), extra.c (2, 8), h (2, 8); 144 bytes)
    """

    names = ("h", "c")

    def __init__(self, hidden_size: int, expansion: float = 1.0) -> None:
        super().__init__(hidden_size, expansion, 4)

    def cell(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> Pair:
        w_ih, w_hh, b_ih, b_hh = weights
        h, c = hidden
        gates = torch.nn.functional.linear(x, w_ih, b_ih)
        gates = gates + torch.nn.functional.linear(h, w_hh, b_hh)
        i, f, n, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * n.tanh()
        return o.sigmoid() * c.tanh(), c

    def fused(self, x: Tensor, hidden: Pair, weights: list[Tensor]) -> tuple[Tensor, Pair]:
        hc = [t.unsqueeze(0) for t in hidden]
        y, h, c = torch.lstm(x, hc, weights, True, 1, 0.0, self.training, False, True)
        return y, (h[0], c[0])

    def fused_packed(
        self, x: Tensor, sizes: Tensor, hidden: Pair, weights: list[Tensor]
    ) -> tuple[Tensor, Pair]:
        hc = [t.unsqueeze(0) for t in hidden]
        y, h, c = torch.lstm(x, sizes, hc, weights, True, 1, 0.0, self.training, False)
        return y, (h[0], c[0])
