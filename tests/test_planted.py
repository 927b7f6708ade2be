"""Planted bugs: each law must find what it is there for, and pass the same mixer without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from statewright import laws, ops
from statewright.mixers import GRU, CausalConv, MinGRU, MinLSTM
from statewright.mixers.mingru import g
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.block import Block

D = 6
PLAIN, FLAGS = laws.Case(), laws.Case(flags=True)


class ForgetsTaps(CausalConv):
    def forward(self, x, taps, mask=None, reset=None):
        return super().forward(x, torch.zeros_like(taps), mask, reset)


class DropsShortTaps(CausalConv):
    """Pieces shorter than the kernel hand on zeros instead of the older taps."""

    def forward(self, x, taps, mask=None, reset=None):
        y, new = super().forward(x, taps, mask, reset)
        missing = max(self.width - 1 - x.shape[1], 0)
        return y, torch.cat([torch.zeros_like(new[:, :missing]), new[:, missing:]], 1)


class KeepsTapsOverResets(CausalConv):
    def forward(self, x, taps, mask=None, reset=None):
        return super().forward(x, taps, mask, None)


class Restarts(MinGRU):
    """transformers 5.23's Mamba: a continuation of several tokens starts from zero."""

    def forward(self, x, state=None, mask=None, reset=None):
        if state is not None and x.shape[1] > 1:
            state = replace(self.init_state(x.shape[0]), seen=state.seen)
        return super().forward(x, state, mask, reset)


class CarriedThroughG(MinLSTM):
    """minGRU-pytorch's minLSTM: log_g, not log, of a state that is carried."""

    def forward(self, x, state=None, mask=None, reset=None):
        if state is not None and x.shape[1] > 1:
            state = replace(state, h=g(state.h))
        return super().forward(x, state, mask, reset)


class RestartsOutputs(MinGRU):
    """The state is carried on, but the outputs do not see it."""

    def forward(self, x, state=None, mask=None, reset=None):
        y, _ = super().forward(x, None, mask, reset)
        return y, super().forward(x, state, mask, reset)[1]


class CountsOneCall(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, mask, reset)
        return y, replace(new, seen=torch.full_like(new.seen, x.shape[1]))


class LinearCandidateInStep(MinGRU):
    """The step uses the vanilla candidate, the scan the positive one."""

    def update(self, x, state):
        k, c = self.project(x)
        z = k.sigmoid()
        h = (1 - z) * state.h + z * c
        return self.output(h, x), replace(state, h=h)


class WritesInPlace(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, mask, reset)
        if state is not None:
            with torch.no_grad():
                state.h.copy_(new.h)
        return y, new


class StepWritesInPlace(GRU):
    def step(self, x, state, mask=None, reset=None):
        y, new = super().step(x, state, mask, reset)
        with torch.no_grad():
            state.seen.add_(1)
        return y, new


class IgnoresMask(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, None, reset)
        if mask is None:
            return y, new
        return y, replace(new, seen=super().forward(x, state, mask, reset)[1].seen)


class CountsMasked(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, mask, reset)
        if mask is None:
            return y, new
        return y, replace(new, seen=new.seen + (~mask).sum(1))


class IgnoresReset(GRU):
    def forward(self, x, state=None, mask=None, reset=None):
        return super().forward(x, state, mask, None)


class ResetsToZero(MinGRU):
    """A reset must go back to the learned initial state, not to zero."""

    def forward(self, x, state=None, mask=None, reset=None):
        state = self.init_state(len(x)) if state is None else state
        if reset is not None:
            zero = torch.zeros_like(self.initial())
            self.initial = lambda: zero
        try:
            with ops.default_backend("torch"):
                return super().forward(x, state, mask, reset)
        finally:
            self.__dict__.pop("initial", None)


class MixesRows(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, mask, reset)
        return y + 1e-3 * new.h.mean(), new


class DetachesSilently(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        return super().forward(x, None if state is None else state.detach(), mask, reset)


class DetachesAtTheEnd(MinGRU):
    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x, state, mask, reset)
        return y, new.detach()


class IgnoresDetach(GRU):
    """Finds the attached state again by its values: `state.detach()` does not cut."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.known: list = []

    def forward(self, x, state=None, mask=None, reset=None):
        for known in self.known:
            if state is not None and torch.equal(known.h, state.h):
                state = known
        y, new = super().forward(x, state, mask, reset)
        self.known.append(new)
        return y, new


class ConstantNorm(MinGRU):
    """Outputs of norm 1: what the gradient of their squares measures is rounding."""

    def output(self, h, x):
        return torch.nn.functional.normalize(super().output(h, x), dim=-1)


class IgnoresItsInput(MinGRU):
    """No gradient at all, so a wrong one could not be seen either."""

    def forward(self, x, state=None, mask=None, reset=None):
        y, new = super().forward(x * 1e-30, state, mask, reset)
        return (y * 1e-30).tanh() + 1, new.map(lambda t: t * 1e-30 if t.is_floating_point() else t)


class Grows(MinGRU):
    """Remembers all inputs, in `extra`."""

    def check(self, state, batch_size):
        super().check(state.without_extra("past"), batch_size)

    def forward(self, x, state=None, mask=None, reset=None):
        past = None if state is None else state.extra.get("past")
        y, new = super().forward(x, state, mask, reset)
        past = x if past is None else torch.cat([past, x], 1)
        return y, new.with_extra("past", past, "batch token channel")


class RoundsCopies(MinGRU):
    """Depends on which tensor it is given, not on its values."""

    def forward(self, x, state=None, mask=None, reset=None):
        self.first = getattr(self, "first", None) or (state and state.h.data_ptr())
        if state is not None and state.h.data_ptr() != self.first:
            state = replace(state, h=state.h.float().to(state.h))
        return super().forward(x, state, mask, reset)


class NotSaved(MinGRU):
    """A weight in a buffer that no checkpoint contains."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.register_buffer("scale", torch.rand(hidden_size), persistent=False)

    def output(self, h, x):
        return super().output(h, x) * self.scale


def block(conv: type[CausalConv]) -> Callable[[], Block]:
    def make() -> Block:
        made = Block(StatewrightConfig(hidden_size=D, num_hidden_layers=1), 0)
        made.conv = conv(D, 4)
        return made

    return make


def mixer(kind: type) -> Callable:
    return lambda: kind(D)


SHORT = laws.Case(length=12, splits=(1, 2, 3, 5, 7, 8))
PLANTED = [
    ("fold", mixer(Restarts), mixer(MinGRU), PLAIN),
    ("fold", mixer(CarriedThroughG), mixer(MinLSTM), PLAIN),
    ("fold", mixer(RestartsOutputs), mixer(MinGRU), PLAIN),
    ("fold", mixer(CountsOneCall), mixer(MinGRU), PLAIN),
    ("fold", mixer(LinearCandidateInStep), mixer(MinGRU), PLAIN),
    ("fold", mixer(IgnoresMask), mixer(MinGRU), FLAGS),
    ("fold", mixer(CountsMasked), mixer(MinGRU), FLAGS),
    ("fold", mixer(IgnoresReset), mixer(GRU), FLAGS),
    ("fold", mixer(ResetsToZero), mixer(MinGRU), FLAGS),
    ("fold", block(ForgetsTaps), block(CausalConv), PLAIN),
    ("fold", block(KeepsTapsOverResets), block(CausalConv), FLAGS),
    ("chunk", mixer(Restarts), mixer(MinGRU), PLAIN),
    ("chunk", mixer(RestartsOutputs), mixer(MinGRU), PLAIN),
    ("chunk", mixer(CountsOneCall), mixer(MinGRU), PLAIN),
    ("chunk", mixer(CarriedThroughG), mixer(MinLSTM), PLAIN),
    ("chunk", block(ForgetsTaps), block(CausalConv), PLAIN),
    ("chunk", block(DropsShortTaps), block(CausalConv), SHORT),
    ("gradient", mixer(DetachesSilently), mixer(MinGRU), PLAIN),
    ("gradient", mixer(DetachesAtTheEnd), mixer(MinGRU), PLAIN),
    ("gradient", mixer(IgnoresDetach), mixer(GRU), PLAIN),
    ("value", mixer(WritesInPlace), mixer(MinGRU), PLAIN),
    ("value", mixer(StepWritesInPlace), mixer(GRU), PLAIN),
    ("rows", mixer(IgnoresMask), mixer(MinGRU), PLAIN),
    ("rows", mixer(CountsMasked), mixer(MinGRU), PLAIN),
    ("rows", mixer(IgnoresReset), mixer(GRU), PLAIN),
    ("rows", mixer(ResetsToZero), mixer(MinGRU), PLAIN),
    ("rows", mixer(MixesRows), mixer(MinGRU), PLAIN),
    ("rows", block(KeepsTapsOverResets), block(CausalConv), PLAIN),
    ("bound", mixer(Grows), mixer(MinGRU), PLAIN),
    ("roundtrip", mixer(RoundsCopies), mixer(MinGRU), PLAIN),
]


def made(make: Callable) -> torch.nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def name_of(value) -> str | None:
    if not callable(value):
        return value if isinstance(value, str) else ""
    subject = made(value)
    return type(getattr(subject, "conv", subject)).__name__


@pytest.mark.parametrize(("law", "broken", "sound", "case"), PLANTED, ids=name_of)
def test_the_law_finds_it(law: str, broken: Callable, sound: Callable, case: laws.Case) -> None:
    finding = laws.LAWS[law](made(sound), case)
    assert finding.ok and finding.law == law, finding
    finding = laws.LAWS[law](made(broken), case)
    assert not finding.ok, finding


def test_a_gradient_that_is_rounding_is_vacuous_and_not_ok() -> None:
    finding = laws.gradient(made(mixer(IgnoresItsInput)), PLAIN)
    assert finding.vacuous and not finding.ok
    finding = laws.gradient(made(mixer(ConstantNorm)), PLAIN)
    assert finding.ok and not finding.vacuous


def test_every_law_has_a_planted_bug() -> None:
    assert {law for law, *_ in PLANTED} == set(laws.LAWS)


def through_a_file(tmp_path, kind: type) -> Callable:
    def reload(subject: torch.nn.Module) -> torch.nn.Module:
        torch.save(subject.state_dict(), tmp_path / "weights.pt")
        fresh = kind(D).double().eval()
        fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
        return fresh

    return reload


@pytest.mark.parametrize(("kind", "ok"), [(MinGRU, True), (NotSaved, False)])
def test_roundtrip_finds_weights_that_are_not_saved(kind: type, ok: bool, tmp_path) -> None:
    subject = made(mixer(kind))
    finding = laws.roundtrip(subject, PLAIN, reload=through_a_file(tmp_path, kind))
    assert finding.ok is ok, finding


@pytest.mark.parametrize("breaks", [False, True])
def test_roundtrip_of_a_whole_model(breaks: bool, tmp_path) -> None:
    config = StatewrightConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2)
    subject = laws.ModelSubject(StatewrightForCausalLM(config).double().eval())

    def reload(subject: laws.ModelSubject) -> laws.ModelSubject:
        subject.model.save_pretrained(tmp_path)
        model = StatewrightForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        if breaks:
            with torch.no_grad():
                model.model.layers[1].conv.weight[0, 0] += 1e-9
        return laws.ModelSubject(model.eval())

    assert laws.roundtrip(subject, FLAGS, reload).ok is not breaks


def test_errors_are_infinite_where_nothing_can_be_compared() -> None:
    ones, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert laws.error(ones, torch.ones(3)) == float("inf")
    assert laws.error(nan, ones) == laws.error(ones, nan) == float("inf")
    assert laws.error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert laws.error(ones * 1.5, ones) == 0.5
    with_seen = MinGRU(D).init_state(2)
    assert laws.error(with_seen, replace(with_seen, seen=with_seen.seen + 1)) == float("inf")
    more = with_seen.with_extra("c", torch.zeros(2, 1), "batch one")
    assert laws.error(with_seen, more) == laws.error(more, with_seen) == float("inf")
