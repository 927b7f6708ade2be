"""The state on its way through a text, and what is kept of what it passed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.gates import GateReport
from statewright.diagnosis.heads import (
    QUANTITIES,
    Histogram,
    carried_by_head,
    first_not_finite,
    histogram,
    num_groups,
    recurrent_states,
    statistics,
)
from statewright.diagnosis.runner import Runner
from statewright.diagnosis.schedule import PROBES_PER_OCTAVE, Call, Schedule
from statewright.evaluation.losses import nats
from statewright.intervals import of_sums
from statewright.state import MatrixState, ModelState

# A head this much quieter than its layer's loudest does not count as growing.
_QUIET = 1e-4


@dataclass(frozen=True)
class Bucket:
    """The mean loss in nats after more than `begin` and at most `end` tokens, half its 95 %
    interval, over how many tokens."""

    begin: int
    end: int
    nats: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Layer:
    """One recurrent layer at the probes; every list is per probe (or watch), then per head.

    growth: the largest variance beyond the training length, by that of texts of this length.
    retention: what one training length leaves of the state before it: of the first watch where
    the gates are seen, else found by changing the state at the training length, else None.
    """

    name: str
    kind: str
    num_heads: int
    heads_per_curve: int
    statistics: dict[str, list[list[float]]]
    growth: list[float]
    retention: list[float] | None = None
    gates: list[GateReport] = field(default_factory=list)
    histogram: Histogram | None = None


class Typical:
    """The heads' variances after texts of the training length, from an empty state."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows = 0

    def look(self, state: ModelState) -> None:
        for name, part in recurrent_states(state):
            x = carried_by_head(part)
            self._sums[name] = self._sums.get(name, 0) + x.var(-1).sum(0).cpu()
        self._rows += state.batch_size

    def variance(self, name: str) -> Tensor:
        """(H,)"""
        return self._sums[name] / self._rows


class Stream:
    """The state on its way through the text, and the sums that are kept of what it passed."""

    def __init__(self, run: Runner, ids: Tensor, schedule: Schedule) -> None:
        self.run, self.ids, self.schedule = run, ids, schedule
        self.state: ModelState | None = None
        self.trained: ModelState | None = None
        self.sums: dict[int, list[float]] = {}
        self.seen: dict[str, list[Tensor]] = {}
        self.kinds: dict[str, tuple[str, int]] = {}
        self.gates: dict[str, list[GateReport]] = {}
        self.early: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        T = schedule.train_length
        starts = [s for i in range(schedule.num_octaves) for s in schedule.windows(i)]
        # Predictions made half a window or more after its start; windows may overlap.
        wanted = {s + t for s in starts for t in range(T // 2, T)}
        self.wanted = torch.tensor(sorted(wanted), dtype=torch.long)
        self.kept = torch.empty(ids.shape[0], len(wanted))

    def read(self, call: Call) -> None:
        before, ids = self.state, self.ids[:, call.begin : call.end + 1]
        out = self.run(ids[:, :-1], before, call.watch)
        losses = nats(out.logits, ids[:, 1:]).cpu()
        if first_not_finite(out.state) is not None or not torch.isfinite(losses).all():
            raise ValueError(_where_not_finite(self.run, ids, before, call.begin))
        self.state = out.state
        sums = self.sums.setdefault(call.octave, [0.0, 0.0, 0])
        wide = losses.double()
        sums[0] += float(wide.sum())
        sums[1] += float(wide.square().sum())
        sums[2] += wide.numel()
        low, high = torch.searchsorted(self.wanted, torch.tensor([call.begin, call.end])).tolist()
        if high > low:
            self.kept[:, low:high] = losses[:, self.wanted[low:high] - call.begin]
        if call.end == self.schedule.train_length:
            self.trained = out.state
        if call.probe:
            self._look(call.end)
        if call.end in self.schedule.watches and call.watch:
            for number, report in self.run.recorder.take().items():
                self.gates.setdefault(self.run.names[number], []).append(report)

    def _look(self, tokens: int) -> None:
        parts = list(recurrent_states(self.state))
        if not parts:
            raise ValueError(no_recurrence(self.run.host))
        for name, part in parts:
            x = carried_by_head(part)
            heads = part.S.shape[1] if isinstance(part, MatrixState) else 1
            self.kinds[name] = type(part).__name__, heads
            self.seen.setdefault(name, []).append(statistics(x).cpu())
            if tokens == self.schedule.train_length:
                self.early[name] = x[0].cpu().clone()
            if tokens == self.schedule.length:
                self.last[name] = x[0].cpu()

    @property
    def has_attention(self) -> bool:
        """Whether anything but the recurrent states is carried on."""
        held = [layer if isinstance(layer, tuple) else (layer,) for layer in self.state.layers]
        return sum(map(len, held)) > len(self.kinds)

    def buckets(self) -> Iterator[Bucket]:
        for octave, (total, squares, count) in sorted(self.sums.items()):
            begin, end = (0, self.schedule.train_length)
            if octave >= 0:
                begin, end = self.schedule.octave(octave)
            found = of_sums(total, squares, count)
            yield Bucket(begin, end, found.mean, found.margin, count)

    def losses_at(self, starts: list[int]) -> Tensor:
        """What was lost in the second halves of windows: (B * starts, T - T // 2)."""
        T = self.schedule.train_length
        at = torch.tensor(starts)[:, None] + torch.arange(T // 2, T)
        return self.kept[:, torch.searchsorted(self.wanted, at)].flatten(0, 1)

    def layers(self, typical: Typical) -> Iterator[Layer]:
        at = self.schedule.probes.index(self.schedule.train_length)
        for name, looks in self.seen.items():
            (kind, heads), gates = self.kinds[name], self.gates.get(name, [])
            values = torch.stack(looks)
            growth = _growth(values[at + 1 :, 1], typical.variance(name))
            loudest = int(growth.argmax())
            yield Layer(
                name=name,
                kind=kind,
                num_heads=heads,
                heads_per_curve=heads // num_groups(heads),
                statistics={q: values[:, i].tolist() for i, q in enumerate(QUANTITIES)},
                growth=growth.tolist(),
                retention=list(gates[0].retention) if gates else None,
                gates=gates,
                histogram=histogram(loudest, self.early[name][loudest], self.last[name][loudest]),
            )


def _growth(variance: Tensor, typical: Tensor) -> Tensor:
    """(P, H), (H,) -> (H,): the largest mean over an octave of probes, by what is typical.

    One look at a head that forgets quickly says little, so an octave of them is averaged.
    """
    octaves = variance.split(PROBES_PER_OCTAVE)
    peak = torch.stack([octave.mean(0) for octave in octaves]).amax(0)
    floor = _QUIET * peak.max().clamp(min=1e-30)
    return torch.where(peak > floor, peak / typical.clamp(min=1e-30), 1.0)


def _where_not_finite(run: Runner, ids: Tensor, state: ModelState | None, begin: int) -> str:
    """Read the call again token by token: which token, layer and head were the first."""
    for t in range(ids.shape[1] - 1):
        out = run(ids[:, t : t + 1], state)
        state, found = out.state, first_not_finite(out.state)
        token = f"token {begin + t + 1:,} (id {int(ids[0, t])})"
        if found is not None:
            return f"the state of layer {found[0]}, head {found[1]} is not finite from {token} on"
        if not torch.isfinite(nats(out.logits, ids[:, t + 1 : t + 2])).all():
            return f"the loss after {token} is not finite, although the states are"
    return f"a state is not finite between tokens {begin + 1:,} and {begin + ids.shape[1]:,}"


def no_recurrence(host: Any) -> str:
    name = type(getattr(host, "model", host) if not hasattr(host, "raw") else host.model).__name__
    return (
        f"{name} has no recurrent layer, so no state can collapse; for a list of keys and values "
        "use `statewright eval MODEL --task perplexity:text=book.txt --policy window:budget=512`"
    )
