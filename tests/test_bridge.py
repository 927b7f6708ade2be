"""The bridge: transformers' caches as States and back, and Sessions on models that are not ours."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train import one_thread  # noqa: F401
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig

from statewright.hf.bridge import kinds_of, read_state, write_state
from statewright.hf.families import FAMILIES, tiny, tiny_config
from statewright.hf.host import ForeignModel, RawModel, as_host
from statewright.hf.sizing import crossover, layer_sizes, own_layer_sizes
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.session import Session
from statewright.state import KVState, MatrixState, ModelState, OpaqueState, VectorState
from statewright.state_file import load_state, save_state

pytestmark = pytest.mark.filterwarnings("ignore:.*(fed token by token|fed one by one)")
FEW = ("mistral", "mamba", "mamba2", "jamba", "falcon_h1", "zaya", "rwkv", "xlstm", "minimax")
MODELS: dict[str, Any] = {}


def model_of(family: str) -> Any:
    if family not in MODELS:
        MODELS[family] = tiny(family)
    return MODELS[family]


def families(names: tuple[str, ...] = FEW) -> Any:
    """The given families in every run, all of them in the slow one."""
    slow = [pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in names]
    return pytest.mark.parametrize(
        "family", [*names, *(p for p in slow if p.values != ("recurrent_gemma",))]
    )


def text(length: int, rows: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


def fed(model: Any, ids: Tensor, *edges: int) -> Session:
    session = Session(model, batch_size=ids.shape[0])
    for begin, end in zip((0, *edges), edges):
        session.feed(ids[:, begin:end])
    return session


def assert_same(a: Session, b: Session) -> None:
    assert (a.seen, a.tokens_hash) == (b.seen, b.tokens_hash)
    assert torch.equal(a.logits, b.logits)
    for (name, x), (_, y) in zip(a.state.items(), b.state.items(), strict=True):
        assert torch.equal(x, y), name


@families()
@torch.no_grad()
def test_there_and_back(family: str, tmp_path) -> None:
    """A cache written from a State, or from its file, goes on as the cache itself does."""
    raw, ids = RawModel(model_of(family)), text(30, rows=1)
    _, cache = raw(ids[:, :20])
    state = read_state(cache, raw.config, 20)
    before = state.map(torch.clone)
    assert state.batch_size == 1 and state.seen.tolist() == [20]
    save_state(state, tmp_path / "a.state")
    restored = load_state(tmp_path / "a.state")
    outputs = []
    for start in (cache, write_state(state, raw.model), write_state(restored, raw.model)):
        pieces, at = [], 20
        for size in (4, 1, 1):
            logits, start = raw(ids[:, at : at + size], start, at)
            pieces.append(logits)
            at += size
        outputs.append((torch.cat(pieces, 1), read_state(start, raw.config, at)))
    for logits, end in outputs[1:]:
        assert torch.equal(logits, outputs[0][0])
        for (name, x), (_, y) in zip(end.items(), outputs[0][1].items(), strict=True):
            assert torch.equal(x, y), name
    for (name, x), (_, y) in zip(state.items(), before.items(), strict=True):
        assert torch.equal(x, y), name


@families()
def test_sessions(family: str, tmp_path) -> None:
    """A Session goes on as one call reads, and rewinds to what a fresh one has, bit for bit."""
    model, ids = model_of(family), text(40)
    session = fed(model, ids, 15, 30, 31, 40)
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0, -1] for row in ids]
    scale = session.logits.abs().max()
    assert (session.logits - torch.stack(alone)).abs().max() < 2e-3 * scale
    other = session.fork()
    other.feed(text(3, seed=9))
    written = session.generate(3, seed=1)
    session.save(tmp_path / "a.state")
    loaded = Session.load(tmp_path / "a.state", model)
    assert torch.equal(loaded.generate(3, seed=1), session.generate(3, seed=1))
    assert_same(loaded.rewind(43), session.rewind(43))
    assert torch.equal(session.rewind(40).generate(3, seed=1), written)
    for to in (35, 25, 15, 8):
        edges = [e for e in (15, 30, 31) if e < to]
        assert_same(session.rewind(to), fed(model, ids, *edges, to))
    assert other.seen == 43


KINDS = {
    "mistral": KVState,
    "mamba": MatrixState,
    "mamba2": MatrixState,
    "falcon_h1": (MatrixState, KVState),
    "zaya": (VectorState, KVState),
    "rwkv": VectorState,
    "xlstm": MatrixState,
    "minimax": MatrixState,
    "lfm2": OpaqueState,
}


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_what_is_decoded(family: str) -> None:
    raw, ids, kind = RawModel(model_of(family)), text(9), KINDS[family]
    state = read_state(raw(ids)[1], raw.config, torch.tensor([9, 9]))
    layer = state.layers[0]
    if isinstance(kind, tuple):
        assert tuple(map(type, layer)) == kind
    else:
        assert type(layer) is kind
    if family == "mamba2":
        assert layer.S.shape == (2, 4, 8, 16)  # (B, H, d_state, head_dim)
    if family == "mamba":
        assert layer.S.shape == (2, 64, 8, 1) and layer.extra["conv"].shape == (2, 64, 4)
    if family == "mistral":
        assert layer.pos[0, 0].tolist() == list(range(9))
    assert sum(kinds_of(state).values()) == state.nbytes
    rows = state.rows([1, 1])
    assert torch.equal(rows.seen, state.seen) and len(rows.layers) == len(state.layers)


def test_the_recurrent_state_is_transposed_to_key_value() -> None:
    """Mamba-2's cache is (B, H, V, K); our S is its transpose, so a decay by key fits the axes."""
    model = model_of("mamba2")
    cache = RawModel(model)(text(9))[1]
    state = read_state(cache, model.config, 9)
    assert torch.equal(state.layers[0].S.mT, cache.get_recurrent_state(0))
    assert torch.equal(write_state(state, model).get_recurrent_state(0), state.layers[0].S.mT)


def test_reading_and_writing_copy() -> None:
    model = model_of("falcon_h1")
    cache = RawModel(model)(text(9))[1]
    state = read_state(cache, model.config)
    kept = [t.clone() for _, t in state.items()]
    written = write_state(state, model)
    for layer in (*cache.layers, *written.layers):
        for tensor in (layer.keys, layer.recurrent_states[0], layer.conv_states[0]):
            tensor.detach().zero_()
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, state.items()))


def test_gradients_flow_through_the_bridge() -> None:
    model, ids = model_of("mamba2"), text(12, rows=1)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    raw = RawModel(model)
    whole, _ = raw(None, inputs_embeds=embeds)
    (want,) = torch.autograd.grad(whole[:, 8:].square().sum(), embeds)
    _, cache = raw(None, inputs_embeds=embeds[:, :8])
    state = read_state(cache, model.config, 8)
    rest, _ = raw(None, write_state(state, model), 8, inputs_embeds=embeds[:, 8:])
    (got,) = torch.autograd.grad(rest.square().sum(), embeds, retain_graph=True)
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max())
    cut, _ = raw(None, write_state(state.detach(), model), 8, inputs_embeds=embeds[:, 8:])
    (got,) = torch.autograd.grad(cut.square().sum(), embeds)
    assert not got[:, :8].any()


def test_generates_what_transformers_generates() -> None:
    for family in ("mistral", "mamba"):
        model, ids = model_of(family), text(9, rows=1)
        session = fed(model, ids, 9)
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert torch.equal(session.generate(12, temperature=0), wanted[:, 9:])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("family", "by_token", "by_row", "says"),
    [
        ("mamba", True, False, "fed token by token"),
        ("rwkv", False, True, "rows are fed one by one"),
        ("mamba2", False, False, None),
    ],
)
def test_how_it_is_fed_is_announced_once(family, by_token, by_row, says) -> None:
    host = ForeignModel(model_of(family))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        session = fed(host, text(12), 6, 12)
        session.generate(2)
    said = [str(w.message) for w in notes if w.category is UserWarning]
    assert (host.feeding.by_token, host.feeding.by_row) == (by_token, by_row)
    assert len(said) == (says is not None) and all(says in line for line in said)


def test_half_precision_is_fed_by_what_is_known() -> None:
    """Zamba's error hides in bfloat16's rounding; that it restarts is known."""
    model = tiny("zamba").bfloat16()
    assert ForeignModel(model).feeding.by_token
    assert not ForeignModel(tiny("mamba2").bfloat16()).feeding.by_token


def test_positions_are_passed() -> None:
    """Bamba counts positions from 0 in every call unless they are given."""
    model, ids = model_of("bamba"), text(30)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
    assert torch.allclose(fed(model, ids, 10, 20, 30).logits, whole, atol=1e-4)


class Echo(nn.Module):
    """A model that only a test knows: a leaky sum of embeddings, in a cache of its own class."""

    def __init__(self, config: Any, forgets: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.forgets = config, forgets
        self.embed = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64)

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        cache = past_key_values
        if cache is None or self.forgets:
            cache = EchoCache(torch.zeros(input_ids.shape[0], 8), 0, {"norm": torch.ones(3)})
        hidden = []
        for t in range(input_ids.shape[1]):
            cache.memory.mul_(0.9).add_(self.embed(input_ids[:, t]))
            cache.count += 1
            cache.notes["norm"] = torch.full((3,), float(cache.count))
            hidden.append(cache.memory * cache.notes["norm"][0].log1p())
        logits = self.head(torch.stack(hidden, 1))
        return SimpleNamespace(logits=logits, past_key_values=cache)


@dataclass
class EchoCache:
    memory: Tensor
    count: int
    notes: dict[str, Tensor]


@torch.no_grad()
def test_an_unknown_cache_is_opaque_and_works(tmp_path) -> None:
    model, ids = Echo(LlamaConfig(vocab_size=64, num_hidden_layers=1)), text(40)
    session = fed(model, ids, 15, 30, 40)
    assert type(session.state.layers[0]) is OpaqueState
    assert kinds_of(session.state)["other"] > 0
    assert torch.allclose(session.logits, model(ids).logits[:, -1], atol=1e-5)
    session.save(tmp_path / "a.state")
    loaded = Session.load(tmp_path / "a.state", model)
    fork = session.fork()
    fork.feed(text(4, seed=5))
    assert_same(loaded, session)
    assert torch.equal(loaded.generate(4), session.generate(4))
    assert_same(session.rewind(20), fed(model, ids, 15, 20))


def test_what_cannot_be_carried_is_refused() -> None:
    with pytest.raises(ValueError, match="returns no cache: its state lies on its modules"):
        Session(tiny("recurrent_gemma")).feed([5, 6, 7])
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match="however it is fed; it cannot be carried"):
        Session(Echo(config, forgets=True)).feed([5, 6, 7])

    class NoCache(Echo):
        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(self.embed(input_ids)))

    with pytest.raises(ValueError, match="takes no cache"):
        Session(NoCache(config))


def test_states_that_do_not_fit() -> None:
    model = model_of("mamba2")
    cache = RawModel(model)(text(9))[1]
    with pytest.raises(ValueError, match="counts no tokens; give seen="):
        read_state(cache, model.config)
    with pytest.raises(ValueError, match="has read nothing yet"):
        read_state(DynamicCache(config=model.config), model.config)
    state = read_state(cache, model.config, 9)
    with pytest.raises(ValueError, match="the state has 2 layers, the model 3"):
        write_state(replace(state, layers=state.layers[:2]), model)
    assert write_state(ModelState(seen=torch.zeros(2, dtype=torch.int64)), model) is None
    with pytest.raises(ValueError, match="unknown family 'mamba22'; did you mean 'mamba2'"):
        tiny("mamba22")


def test_ours_stay_ours() -> None:
    own = StatewrightForCausalLM(StatewrightConfig(vocab_size=64, hidden_size=8))
    assert as_host(own) is own and as_host(as_host(model_of("mamba2"))).config is not own.config
    assert "state" in inspect.signature(ForeignModel.__call__).parameters


@families(("mistral", "mamba2", "jamba", "zaya", "xlstm"))
@torch.no_grad()
def test_sizes_from_a_config_are_those_of_a_cache(family: str) -> None:
    """What the meta device predicts for any length is what a cache of that length holds."""
    config, raw = tiny_config(family), RawModel(model_of(family))
    sizes = layer_sizes(config, batch=2)
    for length in (5, 23, 24, 60):
        held = kinds_of(read_state(raw(text(length))[1], config, length))
        for kind in ("kv", "recurrent", "conv", "other"):
            assert sum(entry.at(length)[kind] for entry in sizes) == held[kind], (length, kind)


@pytest.mark.parametrize("mixer", ["attention:num_heads=2:window=20", "attention", "mamba2"])
@torch.no_grad()
def test_sizes_of_our_own(mixer: str) -> None:
    model = StatewrightForCausalLM(
        StatewrightConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, mixer=mixer)
    ).eval()
    sizes = own_layer_sizes(model, batch=2)
    for length in (1, 19, 40):
        state = model(text(length)).state
        held = sum(sum(entry.at(length).values()) for entry in sizes) + state.seen.nbytes
        assert held == state.nbytes, length


def test_crossover() -> None:
    assert crossover(lambda n: 1000, 10) == 100
    assert crossover(lambda n: 1000 + 4 * n, 10) == 167
    assert crossover(lambda n: 10 * n, 10) == 1
    assert crossover(lambda n: 1 + 10 * n, 10) is None
