"""donate=True: a list decodes in its own slots, and a donated state is never read again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from statewright import laws
from statewright.mixers import Attention, build_mixer
from statewright.policies import build_policy

torch.set_num_threads(1)
D = 6
SPECS = [
    "attention:num_heads=4:num_kv_heads=2:head_dim=4",
    "attention:num_heads=3:window=6:head_dim=4:qk_norm=true",
    "attention:num_heads=4:num_kv_heads=2:head_dim=4:positions=renumbered",
]
POLICIES = [None, "window:budget=7:sinks=2", "tova:budget=7", "tova:budget=7:per=head:sinks=1"]
POLICIES += ["h2o:budget=8", "h2o:budget=8:per=layer:recent=2", "random:budget=5"]
POLICIES += ["keynorm:budget=6:sinks=1", "keydiff:budget=6", "lagkv:budget=14:lag=5"]
POLICIES += ["tova:budget=900B", "h2o:budget=8:every=3"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def mixer(text: str = SPECS[0]) -> Attention:
    torch.manual_seed(0)
    return build_mixer(text, D).double()


def tokens(length: int = 30, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, length, D, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("policy", POLICIES)
def test_donating_changes_nothing_but_the_copies(policy: str | None, spec: str) -> None:
    """Token by token, with a call of several and a masked token between."""
    m, policy, x = mixer(spec), build_policy(policy), tokens()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 21] = False
    outputs, kept, given = [], None, None
    for begin, end in [
        *((t, t + 1) for t in range(14)),
        (14, 19),
        *((t, t + 1) for t in range(19, 30)),
    ]:
        y, kept = m(x[:, begin:end], kept, mask[:, begin:end], policy=policy)
        z, given = m(x[:, begin:end], given, mask[:, begin:end], policy=policy, donate=True)
        shown = mask[:, begin:end]
        assert laws.error(z[shown], y[shown]) < 1e-12
        assert laws.error(given, kept) < 1e-12 and given.nbytes == kept.nbytes
        outputs.append(y)
    want, end = m(x, None, mask, policy=policy)
    assert laws.error(torch.cat(outputs, 1)[mask], want[mask]) < 1e-12
    assert laws.error(given, end) < 1e-12


@pytest.mark.parametrize("policy", ["tova:budget=7", "keydiff:budget=7", "h2o:budget=7", None])
def test_no_token_copies_the_list(policy: str | None) -> None:
    m, policy, x = mixer(), build_policy(policy), tokens(60)
    _, state = m(x[:, :20], None, policy=policy)
    _, state = m(x[:, 20:21], state, policy=policy, donate=True)
    places, sizes = set(), set()
    for t in range(21, 60):
        _, state = m(x[:, t : t + 1], state, policy=policy, donate=True)
        places.add(state.k.untyped_storage().data_ptr())
        sizes.add(state.k.untyped_storage().nbytes())
    if policy is None:
        # Room grows by a quarter, at least by 32 slots: one copy here.
        assert len(places) <= 2
    else:
        assert len(places) == 1 and sizes == {2 * 2 * 8 * 4 * 8}


def test_a_donated_state_is_refused_with_the_reason() -> None:
    m, policy, x = mixer(), build_policy("tova:budget=7"), tokens()
    _, first = m(x[:, :10], None, policy=policy)
    used = [first]
    _, state = m(x[:, 10:11], first, policy=policy, donate=True)
    for t in range(11, 14):
        used.append(state)
        _, state = m(x[:, t : t + 1], state, policy=policy, donate=True)
    used.append(state)
    _, state = m(x[:, 14:18], state, policy=policy, donate=True)
    used.append(state)
    _, state = m.step(x[:, 18], state, policy=policy, donate=True)
    for old in used:
        # The State around the tensors may be another one by now.
        for again in (old, replace(old), old.with_extra("taps", x[:, :1], "batch tap channel")):
            with pytest.raises(ValueError, match=r"donated to an earlier call \(donate=True\)"):
                m(x[:, :1], again, policy=policy)
        with pytest.raises(ValueError, match="donated"):
            m.step(x[:, 0], old, policy=policy)
    m(x[:, 19:20], state, policy=policy)


def test_a_state_that_is_not_donated_stays_a_value() -> None:
    """Its owner may copy it, keep it, and go on from it twice before giving it away."""
    m, policy, x = mixer(), build_policy("h2o:budget=7"), tokens()
    _, state = m(x[:, :10], None, policy=policy)
    _, state = m(x[:, 10:11], state, policy=policy, donate=True)
    before, fork = state.map(torch.clone), copy.deepcopy(state)
    first, _ = m(x[:, 11:12], state, policy=policy)
    second, _ = m(x[:, 11:14], state, policy=policy)
    assert all(map(torch.equal, *([t for _, t in s.items()] for s in (state, before))))
    third, new = m(x[:, 11:12], state, policy=policy, donate=True)
    assert laws.error(first, third) < 1e-12 and laws.error(second[:, :1], third) < 1e-12
    for _ in range(3):
        _, new = m(x[:, 12:13], new, policy=policy, donate=True)
    assert all(map(torch.equal, *([t for _, t in s.items()] for s in (fork, before))))
    again, _ = m(x[:, 11:12], fork, policy=policy, donate=True)
    assert laws.error(again, third) < 1e-12


def test_another_policy_takes_a_donated_chain_over() -> None:
    m, x = mixer(), tokens()
    given = kept = None
    for t in range(30):
        policy = build_policy("tova:budget=9" if t < 20 else "h2o:budget=9:per=layer")
        _, kept = m(x[:, t : t + 1], kept, policy=policy)
        _, given = m(x[:, t : t + 1], given, policy=policy, donate=True)
        assert laws.error(given, kept) < 1e-12


def test_gradients_take_the_long_way() -> None:
    m, policy, x = mixer(), build_policy("tova:budget=7"), tokens()
    with torch.enable_grad():
        _, state = m(x[:, :12], None, policy=policy)
        y, _ = m(x[:, 12:13], state, policy=policy)
        z, _ = m(x[:, 12:13], state, policy=policy, donate=True)
        pairs = [torch.autograd.grad(o.sum(), m.k_proj.weight, retain_graph=True) for o in (y, z)]
    assert torch.equal(y, z) and torch.equal(*(g for (g,) in pairs))
