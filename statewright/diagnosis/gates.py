"""What the gates of linear recurrences say: how much is kept, and how much is written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from statewright.diagnosis.heads import pooled
from statewright.policies import Chain, Policy, RecurrentPolicy, build_policy
from statewright.policies.recurrent import Gates, Scan
from statewright.state import State

# Tokens; stands for a half-life without end, which JSON has no number for.
FOREVER = 1e9


@dataclass(frozen=True)
class GateReport:
    """Of one layer, per head, over the tokens watched, each the mean over rows.

    retention: what is left of the state before them, the product of their decays; half_life in
    tokens, from their mean log decay; insertion: the mean norm of what one token writes. A head
    with a decay per key reports its slowest.
    """

    retention: tuple[float, ...]
    half_life: tuple[float, ...]
    insertion: tuple[float, ...]


class Recorder:
    """Sums over the tokens since `take`, by layer: log decays, never products, in float64."""

    def __init__(self) -> None:
        self._log_a: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, layer: int, gates: Gates) -> None:
        """The tokens of one scan; masked ones must have been made inert."""
        log_a = gates.log_a.detach().sum(1, dtype=torch.float64)
        v = gates.v.detach()
        if gates.k is None:
            written = v.abs().sum(1, dtype=torch.float64)
        else:
            repeats = v.shape[2] // gates.k.shape[2]
            k = gates.k.detach().float().norm(dim=-1).repeat_interleave(repeats, 2)
            written = (k * v.float().norm(dim=-1)).sum(1, dtype=torch.float64)
        self._log_a[layer] = self._log_a.get(layer, 0) + log_a
        self._written[layer] = self._written.get(layer, 0) + written
        self._tokens[layer] = self._tokens.get(layer, 0) + gates.length

    def take(self) -> dict[int, GateReport]:
        """What was watched since the last `take`, by the number of the linear layer."""
        found = {layer: self._report(layer) for layer in sorted(self._tokens)}
        self.__init__()
        return found

    def _report(self, layer: int) -> GateReport:
        log_a, tokens = self._log_a[layer], self._tokens[layer]
        written = self._written[layer] / tokens
        if log_a.dim() == 2:
            # A vector is one head: its slowest channel, and the norm of what is written.
            log_a, written = log_a.unsqueeze(1), written.norm(dim=-1, keepdim=True)
        slowest = log_a.amax(-1)
        rate = (-slowest.mean(0) / tokens).clamp(min=math.log(2) / FOREVER)
        half_life = (math.log(2) / rate).clamp(max=FOREVER)
        return GateReport(
            *(
                tuple(pooled(values).tolist())
                for values in (slowest.exp().mean(0), half_life, written.mean(0))
            )
        )


@dataclass(frozen=True)
class GateProbe(RecurrentPolicy):
    """Changes nothing; what passes is added to a recorder."""

    recorder: Recorder = field(default_factory=Recorder, compare=False)
    layer: int = 0

    def for_layer(self, layer: int, num_layers: int) -> Self:
        return type(self)(recorder=self.recorder, layer=layer)

    def scan(self, next_scan: Scan, gates: Gates, state: State) -> tuple[Tensor, State]:
        self.recorder.add(self.layer, gates.inert())
        return next_scan(gates, state)


def watched(policy: Policy | str | None, recorder: Recorder) -> Policy:
    """The policy with a probe behind it, which therefore sees the gates as changed by it.

    A part that must be the last one (StateWindow) stays so; it changes no gates.
    """
    chosen, probe = build_policy(policy), GateProbe(recorder=recorder)
    if chosen is None:
        return probe
    parts = chosen.parts if isinstance(chosen, Chain) else (chosen,)
    at = len(parts) - bool(getattr(parts[-1], "innermost", False))
    return Chain(parts=(*parts[:at], probe, *parts[at:]))


def linear_layers(blocks: Iterable[nn.Module]) -> list[str]:
    """The names of the layers that a recurrent policy reaches, in its order."""
    return [str(i) for i, block in enumerate(blocks) if block.mixer.is_linear]
