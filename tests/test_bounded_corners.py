"""BoundedCache in corners: storage after long prompts, bfloat16, foreign attention, copies."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from bounded_models import CONFIGS, GROUPED, random_model, text, tiny
from torch import Tensor
from transformers import (
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MptConfig,
    OpenAIGPTConfig,
    Qwen3Config,
    XGLMConfig,
)

from statewright.hf.arguments import CACHE
from statewright.hf.bounded import BoundedCache
from statewright.policies import Eviction

torch.set_num_threads(1)
POLICIES = ["window:budget=7:sinks=2", "tova:budget=7", "tova:budget=7:per=head", "h2o:budget=7"]
POLICIES += ["h2o:budget=7:per=layer", "random:budget=7", "keynorm:budget=7", "keydiff:budget=7"]
POLICIES += ["lagkv:budget=14:lag=5"]
OPTIONS = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
GPT = dict(vocab_size=40, n_embd=32, n_layer=1, n_head=4)
FOREIGN = {
    "bloom": lambda: BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4),
    "mpt": lambda: MptConfig(vocab_size=40, d_model=32, n_heads=4, n_layers=1),
    "falcon": lambda: FalconConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    ),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=8),
    "codegen": lambda: CodeGenConfig(**GPT, rotary_dim=8),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
    ),
    "openai_gpt": lambda: OpenAIGPTConfig(**GPT),
    "xglm": lambda: XGLMConfig(
        vocab_size=40, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4
    ),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def held(cache: BoundedCache) -> int:
    """Bytes of the storages behind all keys and values, each storage once."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        holder = layer._working or layer._state
        for t in (holder.k, holder.v):
            storage = t.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("prefill", ["exact", "chunk:8", "dense"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_storage_grows_and_no_view_keeps_the_prompt(policy: str, prefill: str) -> None:
    """Right after a long prompt, after pieces of one, and at every single token."""
    model = tiny("llama", "sdpa")
    cache = BoundedCache(model, policy, prefill)
    allowed = 2 * 2 * 2 * 2 * (cache.policy.budget + 1) * 8 * 8
    ids = text(2, 100)
    for piece in ids.split([60, 1, 9, *[1] * 20, 10], 1):
        model(piece, past_key_values=cache)
        assert held(cache) <= allowed
        assert all(s.pos.shape[-1] == cache.policy.budget for s in cache.states)
        assert cache.nbytes == sum(s.nbytes for s in cache.states)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_single_tokens_use_one_set_of_slots(name: str, policy: str) -> None:
    """Also while the list fills, and in layers with windows, soft caps and sinks."""
    changes = {} if name == "llama" else dict(sliding_window=5)
    model, ids = tiny(name, **changes), text(1, 26)
    cache, places = BoundedCache(model, policy), []
    for t in range(26):
        model(ids[:, t : t + 1], past_key_values=cache)
        assert all(layer._working is not None for layer in cache.layers)
        places.append([layer._working.k.data_ptr() for layer in cache.layers])
    assert len({tuple(p) for p in places[cache.policy.budget :]}) == 1
    whole = BoundedCache(model, policy)
    model(ids, past_key_values=whole)
    for a, b in zip(cache.states, whole.states, strict=True):
        assert torch.equal(a.pos.sort(-1).values, b.pos.sort(-1).values)


def test_an_enormous_budget_is_not_allocated_in_advance() -> None:
    model = tiny("llama")
    cache = BoundedCache(model, "tova:budget=1000000000000")
    for t in range(3):
        model(text(1, 1, seed=t), past_key_values=cache)
    assert held(cache) < 100_000


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_handed_out_is_a_value(policy: str) -> None:
    model, ids = tiny("llama", "sdpa"), text(2, 40)
    cache = BoundedCache(model, policy)
    model(ids[:, :20], past_key_values=cache)
    for t in range(20, 24):
        model(ids[:, t : t + 1], past_key_values=cache)
    states, fork = cache.states, copy.deepcopy(cache)
    before = [s.map(torch.clone) for s in states]
    want = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(24, 40)]
    for state, copied in zip(states, before, strict=True):
        assert all(map(torch.equal, *([t for _, t in s.items()] for s in (state, copied))))
    got = [model(ids[:, t : t + 1], past_key_values=fork).logits for t in range(24, 40)]
    assert torch.equal(torch.cat(got), torch.cat(want))


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_and_padding_under_every_policy(policy: str) -> None:
    """A beam's score is its text's, stepped alone; a padded row is the row alone."""
    model, lengths = tiny("llama", "sdpa"), [17, 11]
    mask = torch.arange(17) >= 17 - torch.tensor(lengths).unsqueeze(1)
    ids = text(2, 17).masked_fill(~mask, 0)
    out = model.generate(
        ids,
        attention_mask=mask.long(),
        past_key_values=BoundedCache(model, policy),
        num_beams=3,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **OPTIONS,
    )
    for row, (sequence, length) in enumerate(zip(out.sequences, lengths)):
        alone, total = sequence[17 - length :].unsqueeze(0), 0.0
        cache = BoundedCache(model, policy)
        for t in range(alone.shape[1] - 1):
            logits = model(alone[:, t : t + 1], past_key_values=cache).logits[0, -1]
            if t >= length - 1:
                total += logits.log_softmax(-1)[alone[0, t + 1]].item()
        assert out.sequences_scores[row].item() == pytest.approx(total, abs=1e-4)
    cache = BoundedCache(model, policy)
    first = model.generate(ids[:1], past_key_values=cache, **OPTIONS)
    cache.reset()
    assert torch.equal(model.generate(ids[:1], past_key_values=cache, **OPTIONS), first)
    with pytest.raises(ValueError, match="cannot come back"):
        cache.crop(3)


NARROW = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=100),
    "gpt_neox": CONFIGS["gpt_neox"],
}


@pytest.mark.parametrize("policy", ["tova:budget=9", "h2o:budget=9:recent=4"])
@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_chooses_by_float32_scores(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every victim is the one of a float32 attention over the keys held, wherever that is clear."""
    model, ids = random_model(NARROW[name](), "eager", torch.bfloat16), text(1, 60)
    cache, clear = BoundedCache(model, policy), 0
    real, asked = type(cache.layers[0]).attend, []

    def attend(layer, query, value, rule, mask):
        asked.append((query, layer.new_keys, rule))
        return real(layer, query, value, rule, mask)

    monkeypatch.setattr(type(cache.layers[0]), "attend", attend)
    for t in range(60):
        before = cache.states
        asked.clear()
        assert model(ids[:, t : t + 1], past_key_values=cache).logits.isfinite().all()
        for old, new, (query, key, rule) in zip(before, cache.states, asked, strict=True):
            assert new.seen.tolist() == [t + 1] and new.pos.dtype == torch.int64
            if old is None or old.pos.shape[-1] < 9:
                continue
            clear += _victim_is_clear(cache.policy, old, new, query, key, rule, t)
    assert clear > 60


def _victim_is_clear(policy: Eviction, old, new, query: Tensor, key: Tensor, rule, t: int) -> bool:
    keys = torch.cat([old.k, key], 2).float()
    pos = torch.cat([old.pos, torch.full_like(old.pos[..., :1], t)], -1)
    H = keys.shape[1]
    logits = query.float().view(1, H, -1, query.shape[-1]) @ keys.mT * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    weights, result = logits.softmax(-1), True
    if policy.needs == "last_row":
        score = weights.mean((1, 2)).expand(H, -1)
    else:
        mass = torch.cat([old.extra["policy_mass"], torch.zeros(1, H, 1)], -1)
        score = (mass + weights.sum(2))[0].masked_fill(pos[0] > t - 4, torch.inf)
    for head in range(H):
        lowest, second = score[head].sort().values[:2].tolist()
        if second - lowest < 1e-6:
            result = False
            continue
        gone = set(pos[0, head].tolist()) - set(new.pos[0, head].tolist())
        assert gone == {pos[0, head, score[head].argmin()].item()}
    return result


@pytest.mark.parametrize("name", FOREIGN)
def test_attention_past_the_interface_is_refused(name: str) -> None:
    model = random_model(FOREIGN[name]())
    if CACHE == "cache" and name in ("gptj", "codegen"):
        # transformers moved these two to the interface in the release that renamed the cache.
        ids, idle = text(2, 20), BoundedCache(model, "tova:budget=50")
        got = torch.cat([model(p, cache=idle).logits for p in ids.split([12, 1, 7], 1)], 1)
        assert (got - model(ids).logits).abs().max() < 1e-6 * got.abs().max()
        return
    with pytest.raises(ValueError, match="past transformers' interface, so a policy could not"):
        BoundedCache(model, "tova:budget=4")


def test_the_attention_function_never_runs_without_its_cache() -> None:
    """It has no mask of transformers', so alone it would let tokens see the future."""
    model, ids = copy.deepcopy(tiny("llama")), text()
    cache = BoundedCache(model, "tova:budget=4")
    model.set_attn_implementation("statewright_bounded")
    with pytest.raises(ValueError, match="did not come from the cache's update"):
        model(ids, use_cache=False)
    want = tiny("llama")(ids, past_key_values=BoundedCache(tiny("llama"), "tova:budget=4")).logits
    assert torch.equal(model(ids, past_key_values=cache).logits, want)


def test_a_name_without_a_mask_function_does_not_matter() -> None:
    """transformers gives such a model no mask at all; a BoundedCache never asked for one."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("no_mask_for_this", sdpa_attention_forward)
    model, ids = copy.deepcopy(tiny("llama")), text()
    model.set_attn_implementation("no_mask_for_this")
    for policy in ("tova:budget=4", "window:budget=60"):
        want = tiny("llama")(ids, past_key_values=BoundedCache(tiny("llama"), policy)).logits
        assert torch.equal(model(ids, past_key_values=BoundedCache(model, policy)).logits, want)


def test_spec_names_of_the_policies_here_cover_the_register() -> None:
    from statewright.policies import POLICIES as ALL

    evicting = {name for name, kind in ALL.items() if issubclass(kind, Eviction)}
    assert evicting == {re.match(r"\w+", p)[0] for p in POLICIES}
