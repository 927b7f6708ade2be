"""The attention mixer under the laws, with and without a policy, and what it keeps in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewright import laws
from statewright.mixers import Attention, build_mixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.block import Block
from statewright.policies import build_policy

torch.set_num_threads(1)
D = 6
SPECS = [
    "attention:num_heads=4:num_kv_heads=2:head_dim=4",
    "attention:num_heads=3:window=6:head_dim=4:qk_norm=true:qkv_bias=true",
]
POLICIES = [
    "window:budget=7",
    "window:budget=7:sinks=2:every=3",
    "tova:budget=7",
    "tova:budget=7:per=head:sinks=1:every=4",
    "h2o:budget=8",
    "h2o:budget=8:per=layer:recent=2:every=3",
    "random:budget=5:seed=3",
    "keynorm:budget=6:sinks=1",
    "keydiff:budget=6",
    "lagkv:budget=14:lag=5",
    "tova:budget=900B",
    "h2o:budget=2KiB:every=2",
]


def mixer(text: str, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    return build_mixer(text, D).to(dtype)


def bounded(policy: str, text: str = SPECS[0]) -> laws.Bounded:
    return laws.Bounded(mixer(text), build_policy(policy))


def hybrid(policy: str | None = None) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=3,
        mixer=["attention:num_heads=2", "mingru"],
        policy=policy,
    )
    return StatewrightForCausalLM(config).double().eval()


def holds(finding: laws.Finding) -> None:
    assert finding.ok, finding


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_obey(policy: str, flags: bool, law: str) -> None:
    holds(laws.LAWS[law](bounded(policy), laws.Case(flags=flags, length=41, splits=(9, 10, 30))))


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("policy", ["tova:budget=4", "h2o:budget=4:every=3"])
def test_policies_obey_inside_a_sliding_window(policy: str, law: str) -> None:
    holds(laws.LAWS[law](bounded(policy, SPECS[1]), laws.Case(flags=True, length=31)))


@given(
    splits=st.lists(st.integers(0, 30), max_size=5),
    flags=st.booleans(),
    seed=st.integers(0, 99),
    policy=st.sampled_from(POLICIES),
    text=st.sampled_from(SPECS),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_split_under_a_policy(splits, flags, seed, policy, text) -> None:
    case = laws.Case(length=30, splits=tuple(splits), flags=flags, seed=seed)
    holds(laws.chunk(bounded(policy, text), case))


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("policy", ["tova:budget=5", "h2o:budget=3KiB"])
def test_hybrid_models_obey(policy: str, law: str) -> None:
    subject = laws.Bounded(laws.ModelSubject(hybrid()), build_policy(policy))
    holds(laws.LAWS[law](subject, laws.Case(flags=True, length=23, splits=(5, 6))))


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("text", [*SPECS, "attention:num_heads=3:head_dim=2:window=300"])
def test_a_call_without_flags_equals_one_whose_flags_say_nothing(text: str, length: int) -> None:
    """The first has no mask in memory; the second goes the way of padding, resets and old slots."""
    attention = mixer(text)
    x = torch.randn(2, length, D, dtype=torch.float64, requires_grad=True)
    flags = torch.ones(2, length, dtype=torch.bool)
    found = []
    for options in ({}, {"mask": flags}, {"reset": ~flags}):
        y, state = attention(x, **options)
        (grad,) = torch.autograd.grad(y.square().sum() + state.k.sum(), x)
        found.append((y, grad, state))
    for y, grad, state in found[1:]:
        assert torch.allclose(y, found[0][0], atol=1e-12)
        assert torch.allclose(grad, found[0][1], atol=1e-11)
        assert torch.equal(state.pos, found[0][2].pos) and torch.equal(state.k, found[0][2].k)


def test_a_block_obeys_with_its_convolution() -> None:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=8, mixer="attention:num_heads=2", mlp_ratio=1.0)
    for policy in (None, "h2o:budget=6"):
        subject = Block(config, 0).double().eval()
        subject = subject if policy is None else laws.Bounded(subject, build_policy(policy))
        for finding in laws.check(subject, laws.Case(flags=True, length=33)):
            holds(finding)


def test_every_law_sees_a_broken_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation that forgets to evict, or evicts one token late, is caught."""
    from statewright.mixers import kv

    real = kv.simulate

    def late(*args, **kwargs):
        died, marks = real(*args, **kwargs)
        return torch.where(died < torch.iinfo(torch.int64).max, died + 1, died), marks

    monkeypatch.setattr(kv, "simulate", late)
    assert not laws.fold(bounded("tova:budget=7"), laws.Case(length=30)).ok

    def never(*args, **kwargs):
        died, marks = real(*args, **kwargs)
        return torch.full_like(died, torch.iinfo(torch.int64).max), marks

    monkeypatch.setattr(kv, "simulate", never)
    assert not laws.bound(bounded("tova:budget=7"), laws.Case(length=30)).ok
    monkeypatch.setattr(kv, "simulate", real)
    assert laws.fold(bounded("tova:budget=7"), laws.Case(length=30)).ok


@pytest.mark.parametrize("policy", [None, "window:budget=9", "h2o:budget=9"])
def test_memory_holds_no_views(policy: str | None) -> None:
    m = mixer(SPECS[0])
    long = torch.randn(1, 400, D, dtype=torch.float64)
    _, state = m(long[:, :300], None, policy=build_policy(policy))
    for _ in range(5):
        _, state = m(long[:, :1], state, policy=build_policy(policy))
        held = sum(t.untyped_storage().nbytes() for _, t in state.items())
        assert held == state.nbytes
    if policy is not None:
        assert state.k.shape[2] == 9
        assert state.k.untyped_storage().nbytes() == 2 * 9 * 4 * 8


def test_training_through_eviction_reaches_the_kept_rows_only() -> None:
    """A token that has left carries no gradient; one that stays does."""
    m, policy = mixer(SPECS[0]), build_policy("window:budget=3")
    x = torch.randn(1, 12, D, dtype=torch.float64, requires_grad=True)
    y, _ = m(x, None, policy=policy)
    (grad,) = torch.autograd.grad(y[:, -1].square().sum(), x, retain_graph=True)
    reached = grad.abs().sum(-1)[0] > 0
    # The last query sees budget + 1 tokens: itself and the three before.
    assert reached.tolist() == [False] * 8 + [True] * 4
    loss = y.square().mean()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(m.parameters())))


def test_marks_leave_with_their_policy_and_heads_must_agree() -> None:
    m, x = mixer(SPECS[0]), torch.randn(2, 20, D, dtype=torch.float64)
    _, state = m(x, None, policy=build_policy("h2o:budget=6"))
    assert set(state.extra) == {"policy_mass"}
    _, plain = m(x[:, :1], state)
    assert plain.extra == {} and plain.k.shape[2] == 7
    with pytest.raises(ValueError, match="per='layer' cannot continue"):
        _, state = m(x, None, policy=build_policy("keynorm:budget=6"))
        m(x, state, policy=build_policy("tova:budget=6"))
    m(x, state, policy=build_policy("tova:budget=6:per=head"))


def test_the_config_s_policy_is_a_default() -> None:
    ids = torch.arange(30).remainder(11).view(1, -1)
    with pytest.warns(UserWarning, match="tova:budget=5"):
        model = hybrid("tova:budget=5")
    assert model(ids).state.layers[0].k.shape[2] == 5
    assert model(ids, policy="none").state.layers[0].k.shape[2] == 30
    assert model(ids, policy="window:budget=3").state.layers[2].k.shape[2] == 3
    with pytest.raises(ValueError, match="expected at least 1 tokens"):
        StatewrightConfig(policy="tova:budget=0")


@pytest.mark.parametrize("policy", ["tova:budget=6", "h2o:budget=6:every=2", "window:budget=5"])
def test_generate_with_a_policy(policy: str) -> None:
    """Left padding and beams through transformers' generate equal each row alone."""
    model, ids = hybrid(), torch.randint(1, 11, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for options in (dict(), dict(num_beams=3)):
        options |= dict(max_new_tokens=9, do_sample=False, pad_token_id=0, policy=policy)
        together = model.generate(ids, attention_mask=mask, **options)
        for row in range(2):
            alone = model.generate(ids[row : row + 1, mask[row].bool()], **options)
            assert torch.equal(together[row, 14:], alone[0, int(mask[row].sum()) :])


@pytest.mark.parametrize("policy", [p for p in POLICIES if "every" not in p])
def test_the_short_way_of_single_tokens_is_the_long_one(policy: str) -> None:
    """Without gradients a full state takes one token in preallocated slots, as a value."""
    m, policy = mixer(SPECS[0]), build_policy(policy)
    x = torch.randn(2, 30, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want, end = m(x, None, policy=policy)
    outputs, state = [], None
    with torch.no_grad():
        for t in range(30):
            before = None if state is None else state.map(torch.clone)
            y, new = m(x[:, t : t + 1], state, policy=policy)
            if state is not None:
                assert all(map(torch.equal, *([t for _, t in s.items()] for s in (state, before))))
            outputs.append(y)
            state = new
            held = sum(t.untyped_storage().nbytes() for _, t in state.items())
            assert held == state.nbytes
    assert laws.error(torch.cat(outputs, 1), want) < 1e-12 and laws.error(state, end) < 1e-12


def test_bad_options_are_named() -> None:
    for text, said in {
        "attention:num_heads=4:num_kv_heads=3": "num_kv_heads=3 does not divide num_heads=4",
        "attention:num_heads=2:head_dim=3": "head_dim=3, expected an even number",
        "attention:head_dim=4:window=0": "window=0, expected at least 1",
        "attention:num_heads=3:rope_scaling=yarn-4": "rope_scaling='yarn-4'",
    }.items():
        with pytest.raises(ValueError, match=said):
            build_mixer(text, D)
    m = mixer(SPECS[0])
    state = m.init_state(2)
    with pytest.raises(ValueError, match=r"state.k is .* expected \(B, H, N, Dh\)"):
        m(torch.randn(2, 3, D).double(), replace(state, k=state.k[:, :1]))
