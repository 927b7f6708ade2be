"""BoundedCache on unmodified transformers models: the checks of the specification, C.1."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from bounded_models import CONFIGS, random_model, text, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from statewright.hf.bounded import BoundedCache
from statewright.policies import H2O, TOVA, Window

torch.set_num_threads(1)
POLICIES = ["window:budget=7", "window:budget=7:sinks=2", "tova:budget=7", "h2o:budget=7"]
POLICIES += ["random:budget=7", "keynorm:budget=7", "keydiff:budget=7", "lagkv:budget=14:lag=5"]
EXACT = 1e-10


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def feed(model: PreTrainedModel, ids: Tensor, cache: object, sizes: list[int]) -> Tensor:
    pieces = ids.split(sizes, 1)
    return torch.cat([model(p, past_key_values=cache, use_cache=True).logits for p in pieces], 1)


def one_by_one(model: PreTrainedModel, ids: Tensor, cache: object) -> Tensor:
    return feed(model, ids, cache, [1] * ids.shape[1])


def survivors(cache: BoundedCache) -> list[Tensor]:
    return [s.pos.sort(-1).values for s in cache.states if s is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_idle_budget_changes_nothing(name: str) -> None:
    model, ids = tiny(name), text(2)
    before, full = model.config.to_dict(), model(ids, use_cache=False).logits
    scale = full.abs().max()
    for text_of in POLICIES:
        policy = re.sub(r"budget=\d+", "budget=64", text_of)
        for sizes in ([40], [11, 1, 1, 27]):
            got = feed(model, ids, BoundedCache(model, policy), sizes)
            assert (got - full).abs().max() < 2e-6 * scale
    cache = BoundedCache(model, "tova:budget=4")
    model(ids, past_key_values=cache)
    assert torch.equal(model(ids, use_cache=False).logits, full)
    assert model.config.to_dict() == before and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_window_is_a_static_mask(sinks: int, attention: str) -> None:
    model, ids, budget = tiny("llama", attention), text(), 9
    q, k = torch.arange(40).view(-1, 1), torch.arange(40)
    seen = (k <= q) & ((k < sinks) | (k >= q - (budget - sinks)))
    mask = torch.zeros(40, 40).double().masked_fill(~seen, torch.finfo(torch.float64).min)
    want = model(ids, attention_mask=mask[None, None], use_cache=False).logits
    got = one_by_one(model, ids, BoundedCache(model, Window(budget, sinks)))
    assert (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_sliding_windows_are_honoured(name: str) -> None:
    """A window shorter than the text, with an idle budget: as without a policy."""
    model, ids = tiny(name, sliding_window=9), text()
    want = model(ids, use_cache=False).logits
    long = tiny(name)(ids, use_cache=False).logits
    assert (want - long).abs().max() > 1e-3
    cache = BoundedCache(model, "tova:budget=64")
    got = feed(model, ids, cache, [7, 20, 1, 12])
    assert (got - want).abs().max() < 5e-6 * want.abs().max()
    assert min(s.pos.shape[-1] for s in cache.states) == 8


@pytest.mark.parametrize("policy", POLICIES)
def test_any_split_is_token_by_token(policy: str) -> None:
    model, ids = tiny("llama", "sdpa"), text(2)
    one = BoundedCache(model, policy)
    want = one_by_one(model, ids, one)
    for sizes in ([40], [7] + [1] * 33, [3, 20, 1, 16]):
        cache = BoundedCache(model, policy)
        assert (feed(model, ids, cache, sizes) - want).abs().max() < EXACT * want.abs().max()
        for a, b in zip(survivors(cache), survivors(one), strict=True):
            assert torch.equal(a, b)


def test_dense_and_chunks_are_labelled_and_differ() -> None:
    model, ids = tiny("llama", "sdpa"), text()
    full = model(ids, use_cache=False).logits
    dense = BoundedCache(model, "tova:budget=7", prefill="dense")
    assert (model(ids, past_key_values=dense).logits - full).abs().max() < EXACT
    exact, chunk = (BoundedCache(model, "tova:budget=7", p) for p in ("exact", "chunk:8"))
    model(ids, past_key_values=exact)
    model(ids, past_key_values=chunk)
    kept = [survivors(c)[1] for c in (dense, exact, chunk)]
    assert all(k.shape[-1] == 7 for k in kept)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[2], kept[1])
    pieces = BoundedCache(model, "tova:budget=7", "dense")
    feed(model, ids, pieces, [8] * 5)
    assert all(map(torch.equal, survivors(pieces), survivors(chunk)))


def stored(layer) -> tuple[Tensor, Tensor]:
    holder = layer._working or layer._state
    return holder.k, holder.v


@pytest.mark.parametrize("policy", POLICIES)
def test_invariants_and_memory(policy: str) -> None:
    """Kept = min(seen, budget) at every step, on storage; layer 0 holds the full cache's rows."""
    model, ids = tiny("qwen2", "sdpa"), text(2)
    cache, full = BoundedCache(model, policy), DynamicCache()
    budget = cache.policy.budget
    model(ids, past_key_values=full, use_cache=True)
    for t in range(40):
        model(ids[:, t : t + 1], past_key_values=cache)
        kept = min(t + 1, budget)
        assert cache.get_seq_length() == t + 1
        assert cache.get_mask_sizes(3, 0) == (kept + 3, t + 1 - kept)
        for state in cache.states:
            assert state.pos.shape[-1] == kept
            assert state.pos.sort(-1).values.diff(dim=-1).gt(0).all()
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in stored(layer))
        assert held <= 2 * 2 * 2 * 2 * (budget + 1) * 8 * 8
    # From the first token beyond the budget on, single tokens overwrite slots in place.
    assert all(layer._working is not None and layer._state is None for layer in cache.layers)
    first, rows = cache.states[0], full.layers[0]
    for mine, theirs in ((first.k, rows.keys), (first.v, rows.values)):
        index = first.pos.unsqueeze(-1).expand_as(mine)
        assert (mine - theirs.gather(2, index)).abs().max() < EXACT


def test_h2o_mass() -> None:
    model, ids = tiny("llama", "sdpa"), text(1, 12)
    idle = BoundedCache(model, "h2o:budget=20")
    feed(model, ids, idle, [5, 7])
    for state in idle.states:
        # Two query heads share a key head, and each of the 12 rows sums to 1.
        assert torch.allclose(state.extra["policy_mass"].sum(-1), torch.full((1, 2), 24.0).double())
    bound, window = BoundedCache(model, H2O(6, recent=6)), BoundedCache(model, Window(6))
    assert torch.equal(one_by_one(model, ids, bound), one_by_one(model, ids, window))


def test_equal_scores_drop_the_oldest_that_is_no_sink() -> None:
    model, ids = copy.deepcopy(tiny("llama", "sdpa")), text(1, 20)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    for sinks in (0, 2):
        cache = BoundedCache(model, TOVA(6, sinks=sinks))
        one_by_one(model, ids, cache)
        want = [*range(sinks), *range(20 - (6 - sinks), 20)]
        assert all(s.flatten(1)[0, :6].tolist() == want for s in survivors(cache))


def test_hybrids_keep_their_recurrent_states() -> None:
    from transformers import FalconH1Config, JambaConfig, Lfm2Config

    base = CONFIGS["llama"]().to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    common = {n: base[n] for n in (*names, "intermediate_size", "num_key_value_heads")}
    common |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    ssm = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
    for config, lists in (
        (Lfm2Config(**common, layer_types=["conv", "full_attention"]), [False, True]),
        (
            JambaConfig(**common, attn_layer_period=2, attn_layer_offset=1, num_experts=1),
            [False, True],
        ),
        (FalconH1Config(**common, **ssm), [True, True]),
    ):
        model, ids = random_model(config, "sdpa"), text(1, 20)
        want = feed(model, ids, DynamicCache(config=config), [12] + [1] * 8)
        idle = BoundedCache(model, "tova:budget=50")
        assert (feed(model, ids, idle, [12] + [1] * 8) - want).abs().max() < 1e-6 * want.abs().max()
        cache = BoundedCache(model, "tova:budget=5")
        out = one_by_one(model, ids, cache)
        assert [s is not None for s in cache.states] == lists
        assert all(s.pos.shape[-1] == 5 for s in cache.states if s is not None)
        assert out.isfinite().all() and cache.get_seq_length() == 20


def test_refusals() -> None:
    from transformers import BloomConfig, FalconConfig, MptConfig

    sizes = dict(vocab_size=40, hidden_size=32, n_layer=1, n_head=4)
    for config in (
        BloomConfig(**sizes),
        MptConfig(vocab_size=40, d_model=32, n_heads=4, n_layers=1),
        FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    ):
        with pytest.raises(ValueError, match="past transformers' interface"):
            BoundedCache(random_model(config), "tova:budget=4")
    model, ids = tiny("llama"), text()
    for policy, said in (("tova:budget=0", "at least 1 tokens"), ("none", "one that evicts")):
        with pytest.raises(ValueError, match=said):
            BoundedCache(model, policy)
    with pytest.raises(ValueError, match="prefill='half', expected"):
        BoundedCache(model, "tova:budget=4", "half")
    with pytest.raises(ValueError, match=r"hold 0 tokens of 272 bytes; expected at least 288"):
        model(ids, past_key_values=BoundedCache(model, "tova:budget=200B"))
    assert model.config._attn_implementation == "eager"
    cache = BoundedCache(model, "tova:budget=4")
    with pytest.raises(ValueError, match=r"attention_mask must be None or \(B, S\)"):
        model(ids, past_key_values=cache, attention_mask=torch.ones(1, 1, 40, 40))
    with pytest.raises(ValueError, match="outside a call of the model"):
        random_model(CONFIGS["phi"]())(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot come back"):
        cache.crop(3)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_end_of_the_position_table(name: str) -> None:
    model, ids = tiny(name), text(1, 129)
    cache = BoundedCache(model, "window:budget=8")
    feed(model, ids[:, :128], cache, [127, 1])
    with pytest.raises(ValueError, match="token 129 is beyond the model's 128 learned positions"):
        model(ids[:, 128:], past_key_values=cache)
    mask = torch.ones(1, 129, dtype=torch.long)
    mask[0, :3] = 0
    padded = BoundedCache(model, "window:budget=8")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, past_key_values=padded, attention_mask=mask, position_ids=positions)
