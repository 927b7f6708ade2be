"""A cache under either of its names, and never under the one that is deprecated."""

from __future__ import annotations

import warnings

import pytest
import torch
from bounded_models import tiny
from transformers import DynamicCache, GenerationConfig

from statewright.evaluation.answers import call_options
from statewright.evaluation.decoding import decode
from statewright.evaluation.losses import losses_into
from statewright.evaluation.measure import metered
from statewright.hf.arguments import CACHE, NAMES, cache_argument, cache_in, is_recurrent
from statewright.hf.bounded import BoundedCache
from statewright.hf.cache import StateCache
from statewright.hf.families import tiny as family
from statewright.hf.host import ForeignModel, RawModel
from statewright.models import StatewrightConfig, StatewrightForCausalLM

IDS = torch.arange(3, 15).view(2, 6)
GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
own_names = pytest.mark.parametrize("name", ["cache", "past_key_values"])


@pytest.fixture
def ours():
    torch.manual_seed(0)
    return StatewrightForCausalLM(StatewrightConfig(vocab_size=16, hidden_size=8)).eval()


@own_names
def test_our_models_take_and_return_both_names(ours, name: str) -> None:
    for part in (ours, ours.model):
        cache = part(IDS[:, :4], use_cache=True).cache
        assert isinstance(cache, StateCache)
        out = part(IDS[:, 4:], **{name: cache})
        assert torch.allclose(out[0], part(IDS)[0][:, 4:], atol=1e-6)
        assert out.cache is out.past_key_values is cache and CACHE in out
    with pytest.raises(ValueError, match="cache and past_key_values are one argument"):
        ours(IDS, cache=StateCache(), past_key_values=StateCache())


@own_names
def test_generate_takes_both_names(ours, name: str) -> None:
    """And feeds no token twice: a cache that `generate` thinks linear is fed all ids again."""
    cache = StateCache()
    first = ours.generate(IDS, GREEDY, **{name: cache})
    seen = cache.get_seq_length()
    second = ours.generate(first, GREEDY, **{name: cache})
    assert cache.get_seq_length() == second.shape[1] - 1 and seen == first.shape[1] - 1
    assert torch.equal(second, ours.generate(first, GREEDY))


def test_no_call_of_ours_uses_a_deprecated_name(ours) -> None:
    model = tiny("llama")
    with warnings.catch_warnings(), metered(model):
        warnings.simplefilter("error")
        for policy in ("none", "tova:budget=4"):
            model.generate(IDS, GREEDY, **call_options(model, policy, "exact"))
            assert len(list(decode(model, IDS, policy, 2, 2))) == 1
        list(losses_into(model, IDS, DynamicCache(config=model.config), 3))
        BoundedCache(model, "keydiff:budget=4", positions="renumbered")
        host = ForeignModel(model)
        host(IDS[:, 4:], host(IDS[:, :4]).state)
        ours.generate(IDS, GREEDY)


@pytest.mark.parametrize(
    ("kind", "recurrent"), [("mamba2", True), ("jamba", False), ("rwkv", True)]
)
def test_what_a_model_calls_its_cache(kind: str, recurrent: bool) -> None:
    model = family(kind)
    raw = RawModel(model)
    _, cache = raw(IDS)
    assert (cache_argument(model) in NAMES) == (kind != "rwkv")
    assert cache is not None and is_recurrent(cache) == recurrent
    assert not is_recurrent(DynamicCache())
    assert cache_in({"cache": None, "past_key_values": cache, "state": 3}) is cache
    assert cache_in({"state": 3}) is None
