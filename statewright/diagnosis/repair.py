"""Search the repairs that need no training on one text, choose by rule, and report on another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewright.diagnosis.prompts import two_texts
from statewright.diagnosis.runner import Runner
from statewright.diagnosis.schedule import Schedule, rows_at, schedule_for
from statewright.diagnosis.train_length import train_length_of
from statewright.evaluation.losses import nats
from statewright.hf.pretrained import locate
from statewright.intervals import Estimate, estimate, stratified
from statewright.models import StatewrightForCausalLM, load
from statewright.models.any_model import tokenizer_of
from statewright.models.calibration import calibrate
from statewright.policies import build_policy, policy_spec

# A repair may cost this much of the loss inside the training length, and must gain as much beyond.
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
# Of a text: so many rows of so many training lengths.
ROWS, LENGTHS = 4, 128
KINDS = ("forgetmore", "statenorm", "statewindow", "deltascale")

Listener = Callable[["Trial"], None]


@dataclass(frozen=True)
class Trial:
    """One policy: the loss inside the training length, and beyond it, in nats per token.

    beyond: the mean over octaves of the length, each counting the same. octaves: (tokens, loss).
    windows: the loss of each window inside. pieces: of each half training length of each row
    beyond, by octave; two trials on one text are compared piece by piece.
    """

    policy: str
    inside: float
    beyond: float
    octaves: tuple[tuple[int, float], ...]
    windows: tuple[float, ...] = field(default=(), repr=False)
    pieces: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    def damage(self, plain: Trial) -> float:
        """The loss inside the training length, by that of the model as it is."""
        return self.inside / max(plain.inside, 1e-9)

    def change(self, plain: Trial) -> float:
        """How far the windows inside are from those of the model as it is: the mean of |loss|."""
        return estimate([abs(a - b) for a, b in zip(self.windows, plain.windows)]).mean

    def against(self, other: Trial) -> Estimate:
        """The loss beyond less another's, piece by piece, and its 95 % interval."""
        pairs = zip(self.pieces, other.pieces)
        return stratified([[a - b for a, b in zip(*octave)] for octave in pairs])

    def gains(self, other: Trial, least: float = 0.0) -> bool:
        """Whether it is finite, and lower beyond than the other by more than `least`, a share of
        the other's loss: the whole 95 % interval of the paired differences lies there."""
        if not (math.isfinite(self.inside) and math.isfinite(self.beyond)):
            return False
        high = self.against(other).high
        known = high is not None and high < -least * other.beyond
        return known or not math.isfinite(other.beyond)

    def as_dict(self) -> dict[str, Any]:
        """Without what is compared piece by piece."""
        names = ("policy", "inside", "beyond", "octaves")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Repair:
    """What was tried on one text, and the choice before and after on another.

    policy: "none" if nothing helped within the damage allowed, `train:N` for N steps of training.
    """

    policy: str
    train_length: int
    trials: tuple[Trial, ...]
    before: Trial
    after: Trial

    @property
    def gain(self) -> Estimate:
        """The change of the loss beyond, in nats, and its 95 % interval."""
        return self.after.against(self.before)

    @property
    def succeeded(self) -> bool:
        return self.policy != "none" and improves(self.after, self.before)

    @property
    def healthy(self) -> bool:
        """Whether what is carried on does no harm: no window over the state gains 2 %."""
        windows = [t for t in self.trials if t.policy.startswith("statewindow")]
        harmless = windows and not any(t.gains(self.trials[0], DAMAGE - 1) for t in windows)
        return self.policy == "none" and bool(harmless)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "policy": self.policy,
            "succeeded": self.succeeded,
            "healthy": self.healthy,
            "train_length": self.train_length,
            "gain": asdict(self.gain),
            "trials": [trial.as_dict() for trial in self.trials],
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }


@torch.no_grad()
def repair(
    model: StatewrightForCausalLM | str | Path,
    text: str | Path | Tensor,
    report: str | Path | Tensor | None = None,
    train_length: int | None = None,
    kinds: Iterable[str] = KINDS,
    listen: Listener = lambda trial: None,
    tokenizer: Any = None,
) -> Repair:
    """Try the mitigations that need no training on a text; measure the choice on `report`.

    model: one of ours, or its directory; unchanged, but that the norms that StateNorm needs are
    measured on `text` and kept with it. text, report: as `diagnose` takes them, in 4 rows of 128
    training lengths, or what there is; report None: the second half of text. `choose` says which
    is chosen; "none" stays where its gain does not hold on `report`.
    `model.config.policy = found.policy` makes it the default. Raises ValueError for texts of less
    than two training lengths, an unknown kind, a model without a linear recurrence, and losses
    inside the training length that are not finite.

    >>> shape = dict(hidden_size=8, num_hidden_layers=1, mixer="mamba2:head_dim=8")
    >>> model = StatewrightForCausalLM(StatewrightConfig(**shape))
    >>> text = "to be or not to be " * 20
    >>> found = repair(model, text, None, 16, ("statewindow",), tokenizer=byte_tokenizer())
    >>> [trial.policy for trial in found.trials]
    ['none', 'statewindow:length=16', 'statewindow:length=8', 'statewindow:length=32']
    """
    place = str(model) if isinstance(model, str | Path) else None
    if not isinstance(text, Tensor):
        tokenizer = tokenizer_of(model, tokenizer)
    model = load(locate(model), "float32") if isinstance(model, str | Path) else model
    train_length = train_length_of(train_length, model.config, place)
    search, report = _two(text, report, tokenizer, LENGTHS * train_length)
    schedule = schedule_for(search, train_length, model.config.vocab_size)
    schedule_for(report, train_length, model.config.vocab_size)
    calibrate(model, _windows(search, schedule)[:, :-1].long())
    plain = try_policy(model, search, train_length, "none")
    check_finite(plain)
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
    if not improves(after, before):
        best, after = "none", before
    return Repair(best, train_length, tuple(trials), before, after)


def _two(
    text: str | Path | Tensor, report: str | Path | Tensor | None, tokenizer: Any, length: int
) -> tuple[Tensor, Tensor]:
    """Ids to search on and ids to report on."""
    if isinstance(text, Tensor):
        if report is None:
            half = text.shape[1] // 2
            return text[:, :half], text[:, half:]
        if isinstance(report, Tensor):
            return text, report
    elif not isinstance(report, Tensor):
        return two_texts(text, report, tokenizer, length, ROWS)
    raise ValueError("report: expected token ids (B, N) beside token ids, and text beside text")


def improves(trial: Trial, plain: Trial) -> bool:
    """Whether it gains more than 2 % beyond the training length, and costs no more inside it."""
    return trial.gains(plain, DAMAGE - 1) and trial.damage(plain) <= DAMAGE


def choose(trials: Sequence[Trial]) -> str:
    """The policy that improves most on the first trial, the model as it is; "none" if none does.

    Those that the best one does not beat by more than the 95 % interval tie with it; the mildest of
    them, which changes the losses inside the training length least, is chosen.
    """
    plain = trials[0]
    better = [t for t in trials[1:] if improves(t, plain)]
    if not better:
        return "none"
    best = min(better, key=lambda t: t.beyond)
    ties = [t for t in better if not best.gains(t)]
    return min(ties, key=lambda t: t.change(plain)).policy


def check_finite(plain: Trial) -> None:
    """ValueError where the model is broken inside its training length, which no repair mends."""
    if not math.isfinite(plain.inside):
        raise ValueError(
            f"the loss inside the training length is {plain.inside}, expected a finite one: the "
            "model's weights are broken"
        )


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
    windows = run.windows(_windows(ids, schedule)).double().mean(1)
    beyond: dict[int, list[Tensor]] = {}
    state = None
    for call in schedule.calls():
        piece = ids[:, call.begin : call.end + 1]
        out = run(piece[:, :-1], state)
        state = out.state
        if call.octave >= 0:
            beyond.setdefault(call.octave, []).append(nats(out.logits, piece[:, 1:]).cpu())
    losses = [torch.cat(parts, 1).double() for _, parts in sorted(beyond.items())]
    ends = [schedule.octave(n)[1] for n in sorted(beyond)]
    octaves = tuple((end, float(x.mean())) for end, x in zip(ends, losses))
    mean = sum(loss for _, loss in octaves) / len(octaves)
    pieces = tuple(_pieces(x, max(1, train_length // 2)) for x in losses)
    inside, each = float(windows.mean()), tuple(windows.tolist())
    return Trial(policy, inside, mean, octaves, each, pieces)


def _pieces(losses: Tensor, length: int) -> tuple[float, ...]:
    """Means of losses (B, T) over whole pieces of a length, or over the row if it is shorter."""
    length = min(length, losses.shape[1])
    whole = losses[:, : losses.shape[1] // length * length]
    return tuple(whole.unflatten(1, (-1, length)).mean(2).flatten().tolist())


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
            if trial.gains(best) and trial.damage(plain) <= DAMAGE:
                best, factors = trial, changed
