"""Context parallelism: one sequence over processes, each with its own consecutive tokens.

A linear recurrence over a stretch of tokens is the pair (A, F): the product of its decays, and the
state it leaves when it begins from zero. Stretches combine as (A', F')(A, F) = (A' A, A' F + F'),
so every process scans its tokens from zero, all exchange their pairs once, and each adds what the
state before its tokens contributes: q_t (a_1 ... a_t) S. That is exact, forward and backward, and
the exchange is a state per process and layer, whatever the length.

A convolution needs its last inputs from the process before. Everything else is per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from statewright.mixers import CausalConv
from statewright.mixers.base import advance_seen
from statewright.models.lm import StatewrightOutput
from statewright.policies.recurrent import (
    Gates,
    RecurrentPolicy,
    Scan,
    carried,
    restarted,
    with_carried,
)
from statewright.state import ModelState, State

_SUSPENDED = "_statewright_suspended"


@dataclass(frozen=True)
class ContextParallel(RecurrentPolicy):
    """Wraps a scan over this process's tokens so that it is one over all processes' tokens.

    The state that goes in is the sequence's, the same on every process; so is the one that comes
    out, after the last token of the last process. Without masks.
    """

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        if gates.mask is not None:
            raise ValueError("context parallel: masked tokens are not supported; pack documents")
        gates, S0 = restarted(gates), carried(state)
        if gates.initial is not None:
            # In the graph of every process, or DDP waits for a gradient that never comes.
            S0 = torch.where(S0.new_zeros(S0.shape[0], 1, dtype=torch.bool), gates.initial, S0)
            gates = replace(gates, initial=None)
        o, end = next_scan(gates, with_carried(state, torch.zeros_like(S0)))
        # Products with a state stay in its dtype, also under autocast.
        with torch.autocast(S0.device.type, enabled=False):
            decays = _decays(gates, S0.dtype)
            before, after = _exchange(decays[:, -1], carried(end), S0)
            read = _read(gates, decays, before)
        return o + read.to(o.dtype), with_carried(end, after)


class ContextModel(nn.Module):
    """A causal LM that reads each sequence on all processes at once, every one its own tokens.

    model(ids, state, reset): this process's tokens (B, T) and resets, the state before the whole
    sequence, the same everywhere; -> this process's logits, the state after the whole sequence.
    Gradients of the parameters are those of this process's loss: sum them over the processes.
    From now on the model's convolutions exchange their taps, except within `suspended`.
    Raises ValueError for a model with a layer that is no linear recurrence.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for number, block in enumerate(model.model.layers):
            if not block.mixer.is_linear:
                raise ValueError(
                    f"parallel=context: layer {number} is {type(block.mixer).__name__}; only "
                    "linear recurrences (minGRU, minLSTM, Mamba, Mamba-2, GLA) can be divided"
                )
        for module in model.modules():
            if isinstance(module, CausalConv):
                module.register_forward_pre_hook(_taps_before)
                module.register_forward_hook(_taps_after)
        self.model = model

    def forward(
        self, ids: Tensor, state: ModelState | None = None, reset: Tensor | None = None
    ) -> StatewrightOutput:
        state = self.model.init_state(ids.shape[0]) if state is None else state
        out = self.model(ids, state=state, reset=reset, policy=ContextParallel())
        counts = _counts(state.seen, ids.shape[1], reset)
        pairs = zip(out.state.layers, state.layers)
        layers = tuple(replace(new, seen=_seen(old.seen, counts)) for new, old in pairs)
        after = ModelState(layers=layers, seen=_seen(state.seen, counts))
        return StatewrightOutput(logits=out.logits, state=after)


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Within the block, an attached model works on whole sequences again, without the policy."""
    convolutions = [m for m in model.modules() if isinstance(m, CausalConv)]
    for module in convolutions:
        setattr(module, _SUSPENDED, True)
    try:
        yield
    finally:
        for module in convolutions:
            delattr(module, _SUSPENDED)


def _taps_before(module: CausalConv, args: tuple) -> tuple | None:
    """x (B, T, D) of this process, taps of the whole sequence -> the taps before x."""
    if hasattr(module, _SUSPENDED):
        return None
    x, taps, mask, reset = (*args, None, None)[:4]
    W = module.width
    if x.shape[1] < W - 1:
        raise ValueError(
            f"context parallel: {x.shape[1]} tokens per process, expected at least {W - 1} for a "
            f"convolution over {W}"
        )
    # Inputs of an earlier document are zeros, as everywhere.
    own = x[:, x.shape[1] - W + 1 :]
    if reset is not None:
        last = reset[:, x.shape[1] - W + 1 :].flip(1).cumsum(1).flip(1)
        own = own * (last - reset[:, x.shape[1] - W + 1 :].long() == 0).unsqueeze(-1)
    ends = _gathered(own.to(taps.dtype))
    rank, size = dist.get_rank(), dist.get_world_size()
    return x, _chosen([taps, *ends[: size - 1]], rank), mask, reset


def _taps_after(module: CausalConv, args: tuple, output: tuple) -> tuple | None:
    """The taps after the call are those of the last process."""
    if hasattr(module, _SUSPENDED):
        return None
    y, taps = output
    return y, _gathered(taps)[-1]


def _decays(gates: Gates, dtype: torch.dtype) -> Tensor:
    """Products of the decays up to and including each token, 0 from a reset on."""
    log_a = gates.log_a.to(dtype)
    if gates.reset is not None:
        shape = (*gates.reset.shape, *[1] * (log_a.dim() - 2))
        log_a = log_a.masked_fill(gates.reset.view(shape), -torch.inf)
    return log_a.cumsum(1).exp()


def _read(gates: Gates, decays: Tensor, before: Tensor) -> Tensor:
    """What the state before adds: a_1 ... a_t h (B, T, D), or q_t^T (a_1 ... a_t S) (B, T, H, V).

    Groups of q are never expanded.
    """
    if gates.q is None:
        return decays * before.unsqueeze(1)
    G, H = gates.q.shape[2], before.shape[1]
    q = gates.q.to(before.dtype).unsqueeze(3) * decays.unflatten(2, (G, H // G))
    return torch.einsum("btgrk,bgrkv->btgrv", q, before.unflatten(1, (G, H // G))).flatten(2, 3)


def _exchange(A: Tensor, F: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    """The state before this process's tokens, and after the last process's."""
    states = [S0]
    for both in _gathered(torch.cat([A.flatten(1), F.flatten(1)], 1)):
        A_j, F_j = both.split([A[0].numel(), F[0].numel()], 1)
        A_j = A_j.reshape(A.shape) if S0.dim() == 2 else A_j.reshape(*A.shape, 1)
        states.append(A_j * states[-1] + F_j.reshape(F.shape))
    return _chosen(states[:-1], dist.get_rank()), states[-1]


def _counts(seen: Tensor, T: int, reset: Tensor | None) -> list[Tensor]:
    """Of every process (2, B): tokens since the row's last reset here, and whether there is one."""
    tokens = advance_seen(torch.zeros_like(seen), T, None, reset)
    again = torch.zeros_like(seen) if reset is None else reset.any(1).long()
    return _gathered(torch.stack([tokens, again]))


def _seen(seen: Tensor, counts: list[Tensor]) -> Tensor:
    """`seen` (B,) after the last process's tokens."""
    for tokens, again in counts:
        seen = torch.where(again > 0, tokens, seen + tokens)
    return seen


def _chosen(candidates: list[Tensor], rank: int) -> Tensor:
    """`candidates[rank]`, with the others in the graph: backward exchanges on all or on none."""
    own = candidates[rank]
    none = torch.zeros((), dtype=torch.bool, device=own.device)
    for other in candidates:
        own = torch.where(none, other, own)
    return own


def _gathered(tensor: Tensor) -> list[Tensor]:
    return list(_Gather.apply(tensor).unbind(0))


class _Gather(torch.autograd.Function):
    """All processes' tensors (world, ...) on each; backward sums what each does with mine."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
