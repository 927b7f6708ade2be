"""Windows over a recurrent state: the identity, its control, its reach, and no drift."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from recurrent_oracle import D, bounded, loop, model, recurrence

from statewright import laws
from statewright.policies import StateWindow, recurrent
from statewright.policies.recurrent import Gates, RecurrentPolicy
from statewright.state import VectorState


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("r", [1, 2, 64, 200])
def test_a_window_is_a_scan_restarted(r: int, dtype: torch.dtype, tolerance: float) -> None:
    """S5: what is read at the last token is what a scan of the last r tokens alone reads."""
    tokens, gates, state = recurrence("head", T=200)
    gates = replace(gates, **{n: getattr(gates, n).to(dtype) for n in ("q", "k", "v", "log_a")})
    state = replace(state, S=torch.zeros_like(state.S).to(dtype))
    o, _ = recurrent.scan(gates, state, StateWindow(r))
    alone, _ = recurrent.scan(gates.piece(200 - r, 200), state)
    assert laws.error(o[:, -1], alone[:, -1]) < tolerance


def test_one_decay_too_many_is_seen() -> None:
    """S6: the control of S5: a window's sum off by one token is far outside the tolerance."""
    _, gates, state = recurrence("head", T=200)
    state = replace(state, S=torch.zeros_like(state.S))
    slow = replace(gates, log_a=gates.log_a * 0.01)
    o, _ = recurrent.scan(slow, state, StateWindow(64))
    for wrong in (63, 65):
        alone, _ = recurrent.scan(slow.piece(200 - wrong, 200), state)
        assert laws.error(o[:, -1], alone[:, -1]) > 1e-4


@pytest.mark.parametrize("layers, r, reach", [(1, 40, 42), (3, 40, 126), (2, 5, 14)])
def test_the_receptive_field_of_a_window(layers: int, r: int, reach: int) -> None:
    """S8: with convolutions of 4 taps, L layers see the last L (r + 2) tokens besides their own."""
    net, T = model(layers), reach + 20
    for block in net.model.layers:
        block.mixer.A_log.data -= 6  # decays near 1, so that the oldest token is felt
    ids = torch.randint(97, (1, T), generator=torch.Generator().manual_seed(3))
    want = net(ids, policy=f"statewindow:length={r}").logits[:, -1]
    changed = []
    for back in range(T):
        other = ids.clone()
        other[0, T - 1 - back] = (other[0, T - 1 - back] + 1) % 97
        got = net(other, policy=f"statewindow:length={r}").logits[:, -1]
        changed.append(not torch.equal(got, want) and laws.error(got, want) > 1e-13)
    assert max(i for i, different in enumerate(changed) if different) == reach


@pytest.mark.parametrize(
    "text", ["mamba2:state_size=5:head_dim=4", "mingru", "gla:num_heads=3:expand_k=1"]
)
def test_a_stream_of_a_window_does_not_drift(text: str) -> None:
    """S9: token by token over many windows, in float32, against one float64 call."""
    subject = bounded(text, "statewindow:length=16")
    x = torch.randn(1, 400, D, generator=torch.Generator().manual_seed(2)).double()
    want, _ = subject(x)
    subject = subject.float()
    outputs, state = [], subject.init_state(1)
    with torch.no_grad():
        for t in range(400):
            y, state = subject(x[:, t : t + 1].float(), state)
            outputs.append(y)
    assert laws.error(torch.cat(outputs, 1).double(), want) < 1e-4


def test_no_drift_after_a_hundred_thousand_tokens() -> None:
    """S9: a decay near 1, so that the carried state dwarfs the window, in float32."""
    g = torch.Generator().manual_seed(0)
    T, r = 100_000, 50
    v, log_a = torch.randn(1, T, 4, generator=g) + 1, torch.full((1, T, 4), -1e-6)
    gates = Gates(v, log_a, torch.zeros(1, dtype=torch.long))
    state = VectorState(h=torch.zeros(1, 4), seen=torch.zeros(1, dtype=torch.long))
    for begin in range(0, T, 1000):
        h, state = recurrent.scan(gates.piece(begin, begin + 1000), state, StateWindow(r))
    back = torch.arange(r - 1, -1, -1).double()
    want = (v[:, -r:].double() * (-1e-6 * back).exp().view(1, -1, 1)).sum(1)
    assert laws.error(h[:, -1].double(), want) < 1e-5
    assert state.h.abs().min() > 1000 * h[:, -1].abs().max()


@dataclass(frozen=True)
class Banded(RecurrentPolicy):
    """The definition for a whole model: every token sums its band, one by one."""

    length: int = 1

    def scan(self, next_scan, gates, state):
        tokens = {"q": gates.q, "k": gates.k, "v": gates.v, "log_a": gates.log_a}
        H = gates.v.shape[2]
        for name in ("q", "k"):
            tokens[name] = tokens[name].repeat_interleave(H // tokens[name].shape[2], 2)
        tokens["log_a"] = tokens["log_a"].expand_as(tokens["k"])
        o, S = loop(tokens, "statewindow", state.S, length=self.length)
        return o, replace(state, S=S)


def test_a_windowed_model_is_the_banded_model() -> None:
    """S7: three layers, logits at all positions, in one call and in pieces."""
    net = model(3)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = net(ids, policy=Banded(length=7)).logits
        out = net(ids[:, :13], policy="statewindow:length=7")
        rest = net(ids[:, 13:], state=out.state, policy="statewindow:length=7").logits
        assert laws.error(net(ids, policy="statewindow:length=7").logits, want) < 1e-12
        assert laws.error(torch.cat([out.logits, rest], 1), want) < 1e-12
        assert laws.error(net(ids, policy="statewindow:length=8").logits, want) > 1e-4
