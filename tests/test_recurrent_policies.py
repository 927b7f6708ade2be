"""Repairs without training: each equals its float64 token loop, under all laws, at any split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import recurrent_oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_oracle import D, bounded, model, recurrence

from statewright import laws, ops
from statewright.mixers import build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.block import Block, layer_policies
from statewright.policies import (
    Chain,
    StateNorm,
    build_policy,
    policy_spec,
    recurrent,
    recurrent_parts,
)
from statewright.policies.recurrent import Gates, RecurrentPolicy
from statewright.state import MatrixState

MIXERS = [
    "mingru",
    "mingru:form=vanilla:expansion=2:learned_init=false",
    "minlstm:normalize=false",
    "mamba2:state_size=5:head_dim=4",
    "mamba2:state_size=4:head_dim=4:num_groups=3:dt_max=0.01",
    "gla:num_heads=3:expand_k=1",
    "gla:num_heads=2:conv_kernel=4:feature_map=elu:output_gate=false:expand_k=1",
    "mamba:state_size=3",
]
POLICIES = [
    "forgetmore:decay=0.9:write=0.75",
    "statenorm:limit=0.2:every=1",
    "statenorm:limit=0.2:every=5",
    "statewindow:length=2",
    "statewindow:length=7",
    "statewindow:length=200",
    "forgetmore:decay=0.95+statenorm:limit=0.3:every=4",
    "statenorm:limit=0.3:every=4+statewindow:length=6",
]
SCALED = "deltascale:factor=0.4"


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("text", MIXERS)
def test_mixers_obey_under_a_policy(text: str, policy: str, law: str) -> None:
    finding = laws.LAWS[law](
        bounded(text, policy), laws.Case(length=33, splits=(7, 20), flags=True)
    )
    assert finding.ok, finding


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("text", [m for m in MIXERS if m.startswith("mamba")])
def test_a_scaled_step_obeys(text: str, law: str) -> None:
    finding = laws.LAWS[law](bounded(text, SCALED), laws.Case(length=33, flags=True))
    assert finding.ok, finding


@pytest.mark.parametrize("law", ["fold", "chunk", "rows"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["native", "ref"])
@pytest.mark.parametrize(
    "text", ["mingru", "mamba2:state_size=5:head_dim=4", "gla:num_heads=3:expand_k=1"]
)
def test_backends_obey_under_a_policy(text: str, backend: str, policy: str, law: str) -> None:
    with ops.default_backend(backend):
        case = laws.Case(length=33, flags=True, dtype=torch.float32, backend=backend)
        finding = laws.LAWS[law](bounded(text, policy, torch.float32), case)
    assert finding.ok, finding


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    splits=st.lists(st.integers(0, 40), max_size=5),
    policy=st.sampled_from(POLICIES),
    text=st.sampled_from(MIXERS),
    seed=st.integers(0, 99),
)
def test_any_split_under_a_policy(splits: list[int], policy: str, text: str, seed: int) -> None:
    case = laws.Case(length=40, splits=tuple(splits), seed=seed, flags=True)
    finding = laws.chunk(bounded(text, policy), case)
    assert finding.ok, finding


CASES = {
    "forgetmore:decay=0.9:write=0.75": dict(decay=0.9, write=0.75),
    "statenorm:limit=1.5:every=1": dict(limit=1.5, every=1, seen=11),
    "statenorm:limit=1.5:every=4": dict(limit=1.5, every=4, seen=11),
    "statewindow:length=1": dict(length=1),
    "statewindow:length=6": dict(length=6),
    "deltascale:factor=0.4": dict(factor=0.4),
}


@pytest.mark.parametrize("size", [1, 7, 23])
@pytest.mark.parametrize("kind", ["head", "key", "vector"])
@pytest.mark.parametrize("policy", CASES)
def test_a_policy_is_its_token_loop(policy: str, kind: str, size: int) -> None:
    tokens, gates, state = recurrence(kind)
    start = recurrent.carried(state)
    name = policy.partition(":")[0]
    want, end = recurrent_oracle.loop(tokens, name, start, **CASES[policy])
    outputs, chosen = [], build_policy(policy)
    for begin in range(0, 23, size):
        piece = gates.piece(begin, min(begin + size, 23))
        o, state = recurrent.scan(piece, state, chosen)
        outputs.append(o)
    assert laws.error(torch.cat(outputs, 1), want) < 1e-12
    assert laws.error(recurrent.carried(state), end) < 1e-12


def test_counts_know_masks_and_resets() -> None:
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]]).bool()
    reset = torch.tensor([[0, 0, 0, 1, 0, 0]]).bool()
    gates = Gates(
        torch.zeros(1, 6, 2), torch.zeros(1, 6, 2), torch.tensor([7]), mask=mask, reset=reset
    )
    assert gates.counts().tolist() == [[8, 8, 9, 1, 1, 2]]
    assert gates.piece(4, 6).counts().tolist() == [[1, 2]]


@pytest.mark.parametrize("text", MIXERS)
def test_ones_change_nothing(text: str) -> None:
    """S3: decay = write = 1, an infinite limit and a window of everything are no policy at all."""
    plain = bounded(text, "forgetmore:decay=1:write=1").subject
    x = torch.randn(2, 19, D, generator=torch.Generator().manual_seed(1)).double()
    want, end = plain(x)
    for policy in ("forgetmore:decay=1", "statenorm:limit=1e9:every=3", "statewindow:length=19"):
        y, state = plain(x, policy=build_policy(policy))
        assert laws.error(y, want) < 1e-12
        assert laws.error(recurrent.carried(state), recurrent.carried(end)) < 1e-12


def test_an_impulse_decays_by_the_extra_factor() -> None:
    """S4: one token inserted, then nothing: the norm falls by decay times the gates, per step."""
    tokens, gates, state = recurrence("head")
    quiet = gates.v.clone()
    quiet[:, 1:] = 0
    state = replace(state, S=torch.zeros_like(state.S))
    policy, norms = build_policy("forgetmore:decay=0.9"), []
    for t in range(6):
        _, state = recurrent.scan(replace(gates, v=quiet).piece(t, t + 1), state, policy)
        norms.append(state.S.flatten(2).norm(dim=-1))
    for t in range(1, 6):
        expected = 0.9 * gates.log_a[:, t, :, 0].exp() * norms[t - 1]
        assert laws.error(norms[t], expected) < 1e-12


@pytest.mark.parametrize("text", MIXERS)
def test_the_norm_never_exceeds_the_limit(text: str) -> None:
    """S10: after every token; a giant entry makes the head smaller, it is not clipped alone."""
    subject = bounded(text, "statenorm:limit=0.2:every=1")
    x = 5 * torch.randn(2, 30, D, generator=torch.Generator().manual_seed(2)).double()
    state = subject.init_state(2)
    for t in range(30):
        with torch.no_grad():
            _, state = subject(x[:, t : t + 1], state)
        value = recurrent.carried(state)
        heads = value if value.dim() == 2 else value.flatten(2)
        assert float(heads.norm(dim=-1).max()) <= 0.2 * (1 + 1e-6)


def test_a_head_is_rescaled_not_clipped() -> None:
    S = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    S[..., 0, 0] = 1e6
    zero = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    gates = Gates(
        zero, torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, dtype=torch.long), zero, zero
    )
    state = MatrixState(S=S, seen=torch.zeros(1, dtype=torch.long))
    _, new = recurrent.scan(gates, state, StateNorm(1.0, every=1))
    assert laws.error(new.S / new.S[..., 0, 0], S / S[..., 0, 0]) < 1e-12
    assert abs(float(new.S.norm()) - 1) < 1e-12


class NoStep(build_mixer("mingru", D).__class__):
    """The authors' omission: single steps without the policy."""

    def step(self, x, state, mask=None, reset=None, policy=None):
        return super().step(x, state, mask, reset, None)


class WrongDirection(StateNorm):
    """The authors' bug: norm / limit."""

    def _limit(self, norm):
        return norm * norm / super()._limit(norm)


class Untold(StateNorm):
    """The authors' bug: outputs are read before the rescaling."""

    def _rescale(self, o, state, rows):
        return o, super()._rescale(o, state, rows)[1]


class BeforeSoftplus(RecurrentPolicy):
    """The authors' bug: an offset on the step size's input, so that insertion changes too."""

    def scan(self, next_scan, gates, state):
        return next_scan(replace(gates, log_a=gates.log_a - 0.1, v=gates.v * 1.1), state)


def test_planted_bugs_are_caught() -> None:
    torch.manual_seed(0)
    policy = build_policy("forgetmore:decay=0.9")
    assert not laws.fold(laws.Bounded(NoStep(D).double(), policy), laws.Case()).ok
    tokens, gates, state = recurrence("head")
    for wrong in (WrongDirection(1.5, every=1), Untold(1.5, every=1)):
        want, _ = recurrent_oracle.loop(tokens, "statenorm", state.S, limit=1.5, every=1, seen=11)
        assert laws.error(recurrent.scan(gates, state, wrong)[0], want) > 1e-3
    want, _ = recurrent_oracle.loop(tokens, "forgetmore", state.S, decay=0.904837418, write=1.0)
    assert laws.error(recurrent.scan(gates, state, BeforeSoftplus())[0], want) > 1e-3
    assert (
        laws.error(
            recurrent.scan(gates, state, build_policy("forgetmore:decay=0.904837418"))[0], want
        )
        < 1e-8
    )


def test_specs_and_chains() -> None:
    text = "forgetmore:decay=0.999:write=0.75+statenorm:limit=2x:every=32"
    chain = build_policy(text)
    assert isinstance(chain, Chain) and policy_spec(chain) == text
    assert [part.label for part in recurrent_parts(chain)] == ["forgetmore", "statenorm"]
    hybrid = StatewrightConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=3, mixer=["mingru", "attention", "lstm"]
    )
    own = layer_policies([Block(hybrid, i) for i in range(3)], "tova:budget=8+forgetmore:decay=0.9")
    assert policy_spec(own[0]) == "forgetmore:decay=0.9"
    assert policy_spec(own[1]) == "tova:budget=8" and own[2] is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("forgetmore:decay=0", "0 < decay <= 1"),
        ("forgetmore:decay=1.5", "0 < decay <= 1"),
        ("forgetmore:write=-1", "write=-1"),
        ("statenorm:limit=0", "norm > 0"),
        ("statenorm:limit=many", "multiple such as '2x'"),
        ("statenorm:every=0", "every=0"),
        ("statewindow:length=0", "at least 1 token"),
        ("deltascale:factor=a", "one per layer"),
        ("deltascale:factor=0", "numbers > 0"),
        ("statewindow:length=4+forgetmore", "last part"),
        ("tova:budget=4+window:budget=4", "at most one part"),
        ("statenorm:norms=3", "no option 'norms'"),
    ],
)
def test_bad_specs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_policy(text)


def test_bad_uses() -> None:
    x = torch.randn(1, 3, D).double()
    with pytest.raises(ValueError, match="have a step size"):
        bounded("gla:num_heads=3:expand_k=1", SCALED)(x)
    with pytest.raises(ValueError, match="no record of"):
        bounded("mingru", "statenorm:limit=2x:every=1")(x)
    with pytest.raises(ValueError, match="2 factors, but the model has 3 layers"):
        model(3)(torch.zeros(1, 4, dtype=torch.long), policy="deltascale:factor=0.5/0.7")
    config = StatewrightConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, mixer="gru")
    with pytest.raises(ValueError, match="linear recurrence"):
        StatewrightForCausalLM(config)(torch.zeros(1, 4, dtype=torch.long), policy="forgetmore")
