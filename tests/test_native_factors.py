"""Constants on decay and insertion inside the fused kernels: as the scan under `ForgetMore`."""

from __future__ import annotations

import pytest
import torch

from statewright import laws, ops
from statewright.mixers import build_mixer
from statewright.ops import native
from statewright.policies import build_policy
from statewright.policies.recurrent import constant_factors

POLICY = "forgetmore:decay=0.9:write=0.75"
MIXERS = [
    "mingru",
    "mingru:form=vanilla:expansion=2",
    "minlstm",
    "minlstm:form=vanilla",
    "minlstm:normalize=false",
]
pytestmark = pytest.mark.skipif(not native.available(), reason="no C kernels")


def found(text: str, backend: str, policy: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, state and all gradients, from a random state, masked and reset."""
    torch.manual_seed(0)
    mixer = build_mixer(text, 6).to(dtype)
    x, state, mask, reset = laws.Case(length=33, flags=True, dtype=dtype).draw(mixer)
    x = x.requires_grad_()
    state = state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    with ops.default_backend(backend):
        y, end = mixer(x, state, mask, reset, build_policy(policy))
    y = y * mask.unsqueeze(-1)
    loss = y.square().sum() + end.h.square().sum()
    return [y, end.h, *torch.autograd.grad(loss, [x, state.h, *mixer.parameters()])]


@pytest.mark.parametrize("text", MIXERS)
def test_the_kernel_equals_the_wrapped_scan(text: str) -> None:
    pairs = zip(*(found(text, backend, POLICY, torch.float64) for backend in ("native", "ref")))
    assert max(laws.error(got, want) for got, want in pairs) < 1e-12


@pytest.mark.parametrize("text", MIXERS)
def test_factors_of_one_change_no_bit(text: str) -> None:
    plain = found(text, "native", "none", torch.float32)
    ones = found(text, "native", "forgetmore:decay=1:write=1", torch.float32)
    assert all(map(torch.equal, plain, ones))


def test_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = native.mingru
    monkeypatch.setattr(native, "mingru", lambda *a: seen.append(a[-1]) or whole(*a))
    mixer = build_mixer("mingru", 6)
    chain = "forgetmore:decay=0.5:write=0.75+forgetmore:decay=0.5"
    mixer(torch.randn(1, 5, 6), policy=build_policy(chain))
    mixer(torch.randn(1, 5, 6), policy=build_policy("statenorm:limit=1"))
    assert seen == [(0.25, 0.75)]


def test_only_constants_are_factors() -> None:
    assert constant_factors(None) == (1.0, 1.0)
    assert constant_factors(build_policy("tova:budget=4")) == (1.0, 1.0)
    assert constant_factors(build_policy(POLICY + "+statewindow:length=4")) is None
