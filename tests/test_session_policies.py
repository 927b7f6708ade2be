"""Sessions under a policy: bounded at every step, and the same after a fork, a rewind or a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded_models import tiny
from torch import Tensor

from statewright import history
from statewright.hf.bounded import BoundedCache
from statewright.hf.families import tiny as family_tiny
from statewright.hf.host import ForeignModel
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.policies import TOVA, ForgetMore, build_policy, policy_spec
from statewright.session import Session
from statewright.state import KVState, State
from statewright.state_file import read_state_file

pytestmark = pytest.mark.filterwarnings("ignore:.*(fed token by token|fed one by one)")
BUDGET = 7
POLICIES = ["window:budget=7:sinks=2", "tova:budget=7", "h2o:budget=7", "random:budget=7"]
each_policy = pytest.mark.parametrize("policy", POLICIES)


def own(mixer: Any = ("attention:num_heads=4:num_kv_heads=2", "mingru"), **options: Any) -> Any:
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        mixer=list(mixer) if isinstance(mixer, tuple) else mixer,
        mlp_ratio=1.0,
        **options,
    )
    model = StatewrightForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


MODELS = {
    "ours": own,
    "llama": lambda: tiny("llama"),
    "gemma2": lambda: tiny("gemma2"),
    "falcon_h1": lambda: family_tiny("falcon_h1").double(),
    "jamba": lambda: family_tiny("jamba", num_experts=1, num_experts_per_tok=1).double(),
}
MADE: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in MADE:
        MADE[name] = MODELS[name]()
    return MADE[name]


each_model = pytest.mark.parametrize("name", MODELS)


def text(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def fed(model: Any, ids: Tensor, *edges: int, **options: Any) -> Session:
    session = Session(model, batch_size=ids.shape[0], **options)
    for begin, end in zip((0, *edges), (*edges, ids.shape[1])):
        session.feed(ids[:, begin:end])
    return session


def lists(state: State) -> list[KVState]:
    layers = [part for la in state.layers for part in (la if isinstance(la, tuple) else (la,))]
    return [part for part in layers if isinstance(part, KVState)]


def survivors(session: Session) -> list[Tensor]:
    return [part.pos.sort(-1).values for part in lists(session.state)]


def assert_same(a: Session, b: Session) -> None:
    """Bit-identical, in everything there is."""
    assert (a.seen, a.tokens_hash, a.nbytes) == (b.seen, b.tokens_hash, b.nbytes)
    assert torch.equal(a.logits, b.logits)
    for (name, x), (_, y) in zip(a.state.items(), b.state.items(), strict=True):
        assert torch.equal(x, y), name


@each_model
@each_policy
def test_chunks_are_tokens(name: str, policy: str) -> None:
    model, ids = model_of(name), text(30, rows=2)
    by_token = fed(model, ids, policy=policy, chunk=1)
    for session in (fed(model, ids, 3, 11, 12, policy=policy), fed(model, ids, policy=policy)):
        # Mamba's transformers code computes single tokens in another order, in float32 at heart.
        assert torch.allclose(session.logits, by_token.logits, atol=1e-4 * by_token.logits.std())
        for x, y in zip(survivors(session), survivors(by_token), strict=True):
            assert torch.equal(x, y) and x.shape[-1] == BUDGET
    free = fed(model, ids)
    assert not torch.allclose(free.logits, by_token.logits, atol=1e-3)


@each_model
@pytest.mark.parametrize("policy", [*POLICIES, "tova:budget=4:every=4"])
def test_the_budget_holds_at_every_step(name: str, policy: str) -> None:
    session = Session(model_of(name), policy=policy, chunk=5)
    chosen, last = build_policy(policy), 0
    for ids in (text(3), text(26, seed=1), text(1, seed=2)):
        session.feed(ids)
        for _ in session.stream(4):
            found = lists(session.state)
            allowed = chosen.budget + session.seen % chosen.every
            assert found and all(part.pos.shape[-1] <= allowed for part in found)
            assert all(part.seen.tolist() == [session.seen] for part in found)
            last = max(last, found[0].pos.shape[-1])
    assert last >= chosen.budget


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_budgets_in_bytes(name: str) -> None:
    model, ids = model_of(name), text(60)
    session = Session(model, policy="tova:budget=3KiB", chunk=7)
    free = Session(model)
    for piece in ids.split(4, dim=1):
        session.feed(piece), free.feed(piece)
        bounded = [replace(part, extra={}, extra_axes={}) for part in lists(session.state)]
        held = sum(part.nbytes for part in bounded) + session.state.seen.nbytes
        assert held <= 3 * 1024
    assert sum(part.nbytes for part in lists(free.state)) > 3 * 1024 and held > 2 * 1024


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@each_policy
def test_a_session_writes_what_generate_does(name: str, policy: str) -> None:
    """Two mechanisms, one of them transformers' own loop."""
    model, ids = model_of(name), text(20)
    cache = BoundedCache(model, policy)
    with torch.no_grad():
        wanted = model.generate(
            ids, past_key_values=cache, max_new_tokens=15, do_sample=False, eos_token_id=None
        )
    session = fed(model, ids, 6, policy=policy)
    assert session.generate(15, temperature=0)[0].tolist() == wanted[0, 20:].tolist()


@each_model
@pytest.mark.parametrize("policy", ["tova:budget=7", "h2o:budget=7"])
def test_back_and_forth(name: str, policy: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(history, "_SINGLES", 6)
    model, ids = model_of(name), text(40)

    def made(to: int) -> Session:
        edges = [edge for edge in (15, 30, 31) if edge < to]
        return fed(model, ids[:, :to], *edges, policy=policy)

    session = made(40)
    fork = session.fork()
    written = session.generate(15, seed=1)
    fork.feed(text(3, seed=9))
    session.save(tmp_path / "a.state")
    loaded = Session.load(tmp_path / "a.state", model)
    assert loaded.policy == build_policy(policy)
    assert torch.equal(loaded.generate(5, seed=1), session.generate(5, seed=1))
    assert_same(loaded.rewind(55), session.rewind(55))
    for to in (50, 53, 41):
        again = session.rewind(to).fork()
        assert torch.equal(again.generate(55 - to, seed=1), written[:, to - 40 :])
        assert_same(again, loaded)
        session = again
    for to in (35, 25, 15, 8):
        assert_same(session.rewind(to), made(to))
    assert fork.seen == 43


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_files_know_their_policy(name: str, tmp_path: Path) -> None:
    model, path = model_of(name), tmp_path / "a.state"
    session = fed(model, text(20), policy="tova:budget=9")
    session.save(path)
    assert read_state_file(path).policy == "tova:budget=9"
    for other in ("tova:budget=8", "window:budget=9", "none"):
        with pytest.raises(ValueError, match=f"made under policy tova:budget=9, not {other}"):
            Session.load(path, model, policy=other)
    assert Session.load(path, model, policy=TOVA(9)).policy == TOVA(9)
    smaller = Session.load(path, model, policy="window:budget=4", change_policy=True)
    smaller.feed(text(1, seed=3))
    assert all(part.pos.shape[-1] == 4 for part in lists(smaller.state))
    if name == "ours":
        free = Session.load(path, model, policy="none", change_policy=True)
        free.feed(text(10, seed=3))
        assert lists(free.state)[0].pos.shape[-1] == 19
    else:
        with pytest.raises(ValueError, match="cannot go on without one"):
            Session.load(path, model, policy="none", change_policy=True)
    fed(model, text(20)).save(path)
    assert read_state_file(path).policy is None
    with pytest.raises(ValueError, match="made under policy none, not tova:budget=9"):
        Session.load(path, model, policy="tova:budget=9")
    late = Session.load(path, model, policy="tova:budget=9", change_policy=True)
    late.feed(text(1, seed=3))
    assert all(part.pos.shape[-1] == 9 for part in lists(late.state))


@pytest.mark.filterwarnings("ignore:the config bounds")
def test_the_configs_policy_is_the_default(tmp_path: Path) -> None:
    model = own(policy="window:budget=5")
    sizes = {}
    for policy in (None, "none", "window:budget=3"):
        session = fed(model, text(12), policy=policy)
        session.save(tmp_path / "a.state")
        sizes[policy] = lists(Session.load(tmp_path / "a.state", model).state)[0].pos.shape[-1]
        assert policy_spec(session.policy) == (policy or "window:budget=5")
        assert read_state_file(tmp_path / "a.state").policy in (policy_spec(session.policy), None)
    assert sizes == {None: 5, "none": 12, "window:budget=3": 3}


def test_recurrent_policies_are_passed_on() -> None:
    model, ids = own("mingru"), text(12)
    under = fed(model, ids, policy="forgetmore:decay=0.5")
    with torch.no_grad():
        wanted = model(ids, policy=ForgetMore(decay=0.5)).logits[:, -1]
    assert torch.allclose(under.logits, wanted, atol=1e-12)
    assert not torch.allclose(under.logits, fed(model, ids).logits, atol=1e-6)
    both = "forgetmore:decay=0.5+tova:budget=7"
    chained = fed(own(), ids, policy=both)
    assert policy_spec(chained.policy) == both
    assert lists(chained.state)[0].pos.shape[-1] == BUDGET


REFUSED = {
    "unknown": (own, "tovaa:budget=4", "did you mean 'tova'"),
    "floor": (own, "tova:budget=0", "expected at least 1 tokens"),
    "no list": (lambda: own("mingru"), "tova:budget=4", "this model has none"),
    "no recurrence": (lambda: own("attention"), "forgetmore", "forgetmore acts on the state of"),
    "nonlinear": (lambda: own("gru"), "forgetmore", "forgetmore acts on the state of a linear"),
    "foreign recurrence": (lambda: tiny("llama"), "forgetmore", "convert the model first"),
    "foreign chain": (lambda: tiny("llama"), "forgetmore+tova:budget=4", "statewright convert"),
    "foreign, no list": (lambda: family_tiny("mamba2"), "tova:budget=4", "Mamba2ForCausalLM has"),
    "own cache": (lambda: family_tiny("minimax"), "tova:budget=4", "no lists .* we can bound"),
    "not in cache": (lambda: family_tiny("rwkv"), "tova:budget=4", "no lists .* we can bound"),
    "a state": (own, own().init_state(1), "expected a Policy or its spec"),
}


@pytest.mark.parametrize("make, policy, reason", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(make: Any, policy: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Session(make(), policy)
    assert "\n" not in str(caught.value)


def test_bytes_that_hold_no_token() -> None:
    for name in ("ours", "llama"):
        with pytest.raises(ValueError, match=r"expected at least .* bytes"):
            Session(model_of(name), "tova:budget=64B").feed([5, 6])


def test_a_foreign_model_serves_several_policies() -> None:
    """Sessions on one host do not see each other, nor does the model see any of them."""
    host, ids = ForeignModel(tiny("llama")), text(20)
    with torch.no_grad():
        before = host.model(ids).logits
    sessions = [Session(host, policy) for policy in (None, "tova:budget=7", "window:budget=3")]
    for piece in ids.split(6, dim=1):
        for session in sessions:
            session.feed(piece)
    assert [lists(s.state)[0].pos.shape[-1] for s in sessions] == [20, 7, 3]
    assert torch.equal(fed(host, ids, 6, 12, 18, policy=TOVA(7)).logits, sessions[1].logits)
    with torch.no_grad():
        assert torch.equal(host.model(ids).logits, before)
