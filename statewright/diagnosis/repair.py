"""Search the repairs that need no training on one text, choose by rule, and report on another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.runner import Runner
from statewright.diagnosis.schedule import Schedule, rows_at, schedule_for
from statewright.evaluation.losses import nats
from statewright.models.calibration import calibrate
from statewright.policies import build_policy, policy_spec

# A repair may cost this much of the loss inside the training length.
DAMAGE = 1.02
# Horizons 1 / (1 - decay) in training lengths, those near one first; shares that are written.
HORIZONS = (1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 16.0)
WRITES = (1.0, 0.75)
LIMITS = ("1x", "2x", "0.5x")
WINDOWS = (1.0, 0.5, 2.0)
FACTORS = (0.9, 0.75, 0.5, 0.25)
_STEPS = (0.7, 1.4)
# Tokens of a state's rescaling; the paper's code has 128, the training length may be shorter.
_EVERY = 64
KINDS = ("forgetmore", "statenorm", "statewindow", "deltascale")

Listener = Callable[["Trial"], None]


@dataclass(frozen=True)
class Trial:
    """One policy: the loss inside the training length, and beyond it, in nats per token.

    beyond: the mean over octaves of the length, each counting the same. octaves: (tokens, loss).
    """

    policy: str
    inside: float
    beyond: float
    octaves: tuple[tuple[int, float], ...]

    def damage(self, plain: Trial) -> float:
        """The loss inside the training length, by that of the model as it is."""
        return self.inside / max(plain.inside, 1e-9)


@dataclass(frozen=True)
class Repair:
    """What was tried on one text, and the choice before and after on another.

    policy: "none" if nothing helped within the damage allowed.
    """

    policy: str
    train_length: int
    trials: tuple[Trial, ...]
    before: Trial
    after: Trial

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def repair(
    model: Any,
    search: Tensor,
    report: Tensor,
    train_length: int,
    kinds: Iterable[str] = KINDS,
    listen: Listener = lambda trial: None,
) -> Repair:
    """Try the mitigations on ids `search` (B, N); measure the choice on `report` (B', N').

    The norms that StateNorm needs are measured on `search` and kept with the model
    (`models.calibration`). Chosen is the smallest loss beyond the training length among those
    within 2 % of the model's loss inside it. Raises ValueError for texts of less than two training
    lengths, an unknown kind, and a model without a linear recurrence.
    """
    schedule = schedule_for(search, train_length, model.config.vocab_size)
    schedule_for(report, train_length, model.config.vocab_size)
    calibrate(model, _windows(search, schedule)[:, :-1].long())
    plain = try_policy(model, search, train_length, "none")
    listen(plain)
    trials = [plain]
    for policy in candidates(model, train_length, kinds):
        trials.append(try_policy(model, search, train_length, policy))
        listen(trials[-1])
    if "deltascale" in kinds and _has_delta(model):
        trials += _scales_per_layer(model, search, train_length, trials, listen)
    best = choose(trials)
    before = try_policy(model, report, train_length, "none")
    after = before if best == "none" else try_policy(model, report, train_length, best)
    return Repair(best, train_length, tuple(trials), before, after)


def choose(trials: list[Trial]) -> str:
    """The best policy beyond the training length that spares what is inside it; "none" else."""
    plain = trials[0]
    spared = [t for t in trials if t.damage(plain) <= DAMAGE and math.isfinite(t.beyond)]
    best = min(spared, key=lambda t: t.beyond, default=plain)
    return best.policy if best.beyond < plain.beyond else "none"


def candidates(model: Any, train_length: int, kinds: Iterable[str] = KINDS) -> Iterator[str]:
    """Policy specs to try, on a log grid around the training length."""
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: {kind!r}, expected some of {', '.join(KINDS)}")
    every = min(_EVERY, train_length)
    if "forgetmore" in kinds:
        for write in WRITES:
            for horizon in HORIZONS:
                decay = 1 - 1 / max(2.0, horizon * train_length)
                yield policy_spec(build_policy(f"forgetmore:decay={decay:.8g}:write={write}"))
    if "statenorm" in kinds:
        for limit in LIMITS:
            yield policy_spec(build_policy(f"statenorm:limit={limit}:every={every}"))
    if "statewindow" in kinds:
        for share in WINDOWS:
            yield f"statewindow:length={max(1, round(share * train_length))}"
    if "deltascale" in kinds and _has_delta(model):
        yield from (f"deltascale:factor={factor}" for factor in FACTORS)


@torch.no_grad()
def try_policy(model: Any, ids: Tensor, train_length: int, policy: str) -> Trial:
    """Losses under a policy: of windows from an empty state, and of ids (B, N) in one go."""
    run = Runner(model, policy)
    schedule = schedule_for(ids, train_length, run.vocab_size)
    inside = float(run.windows(_windows(ids, schedule)).mean())
    sums: dict[int, list[float]] = {}
    state = None
    for call in schedule.calls():
        piece = ids[:, call.begin : call.end + 1]
        out = run(piece[:, :-1], state)
        state = out.state
        if call.octave >= 0:
            total = sums.setdefault(call.octave, [0.0, 0.0])
            losses = nats(out.logits, piece[:, 1:]).double()
            total[0] += float(losses.sum())
            total[1] += losses.numel()
    octaves = tuple((schedule.octave(n)[1], a / b) for n, (a, b) in sorted(sums.items()))
    return Trial(policy, inside, sum(loss for _, loss in octaves) / len(octaves), octaves)


def _windows(ids: Tensor, schedule: Schedule) -> Tensor:
    return rows_at(ids, schedule.first_windows(), schedule.train_length + 1)


def _has_delta(model: Any) -> bool:
    linear = [block.mixer for block in model.model.layers if block.mixer.is_linear]
    return bool(linear) and all(getattr(mixer, "has_delta", False) for mixer in linear)


def _scales_per_layer(
    model: Any, ids: Tensor, train_length: int, trials: list[Trial], listen: Listener
) -> Iterator[Trial]:
    """MambaExtend's factors, one per layer: one pass of coordinate search from the best so far."""
    plain, scaled = trials[0], [t for t in trials if t.policy.startswith("deltascale")]
    best = min(scaled, key=lambda t: t.beyond)
    count = sum(block.mixer.is_linear for block in model.model.layers)
    start = best.policy.rpartition("=")[2] if best.beyond < plain.beyond else "1"
    factors = [float(start)] * count
    for layer in range(count):
        for step in _STEPS:
            changed = [*factors]
            changed[layer] *= step
            spec = "deltascale:factor=" + "/".join(f"{f:.4g}" for f in changed)
            trial = try_policy(model, ids, train_length, spec)
            listen(trial)
            yield trial
            if trial.beyond < best.beyond and trial.damage(plain) <= DAMAGE:
                best, factors = trial, changed
