"""BoundedCache in transformers' generate: padding, beams, sampling, reuse, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from bounded_models import text, tiny
from transformers import DynamicCache

from statewright.hf.bounded import BoundedCache

torch.set_num_threads(1)
POLICIES = ["window:budget=6:sinks=1", "tova:budget=6", "h2o:budget=6", "keydiff:budget=6"]
OPTIONS = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def ragged() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Three left-padded rows of 17, 4 and 11 tokens."""
    lengths, ids = [17, 4, 11], text(3, 17)
    mask = torch.arange(17) >= 17 - torch.tensor(lengths).unsqueeze(1)
    return ids.masked_fill(~mask, 0), mask.long(), lengths


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("policy", POLICIES)
def test_left_padded_rows_are_the_rows_alone(policy: str, name: str) -> None:
    model, (ids, mask, lengths) = tiny(name), ragged()
    cache = BoundedCache(model, policy)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
    for row, length in enumerate(lengths):
        alone = BoundedCache(model, policy)
        want = model.generate(ids[row : row + 1, -length:], past_key_values=alone, **OPTIONS)
        assert torch.equal(together[row, 17:], want[0, length:])
        for mine, single in zip(cache.states, alone.states, strict=True):
            kept = mine.pos[row].sort(-1).values[:, -single.pos.shape[-1] :]
            assert torch.equal(kept, single.pos[0].sort(-1).values)
    assert cache.states[0].seen.tolist() == [n + 9 for n in lengths]


@pytest.mark.parametrize("policy", POLICIES)
def test_right_padding_and_holes_do_not_exist(policy: str) -> None:
    model, ids = tiny("llama", "sdpa"), text(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:], mask[1, 6:9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = BoundedCache(model, policy)
    model(ids, past_key_values=cache, attention_mask=mask, position_ids=positions)
    mask, new = torch.cat([mask, mask.new_ones(2, 1)], 1), text(2, 1, seed=5)
    out = model(
        new, past_key_values=cache, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1
    )
    for row in range(2):
        alone = BoundedCache(model, policy)
        model(ids[row : row + 1, mask[row, :-1].bool()], past_key_values=alone)
        want = model(new[row : row + 1], past_key_values=alone).logits
        assert (out.logits[row] - want[0]).abs().max() < 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_score_as_their_text_alone(policy: str) -> None:
    """Rows are reordered with positions and scores: a beam's score is that of its text stepped."""
    model, (ids, mask, lengths) = tiny("llama", "sdpa"), ragged()
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=BoundedCache(model, policy),
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
        **OPTIONS,
    )
    for row, sequence in enumerate(out.sequences):
        length = lengths[row // 2]
        alone, total = sequence[17 - length :].unsqueeze(0), 0.0
        cache = BoundedCache(model, policy)
        for t in range(alone.shape[1] - 1):
            logits = model(alone[:, t : t + 1], past_key_values=cache).logits[0, -1]
            if t >= length - 1:
                total += logits.log_softmax(-1)[alone[0, t + 1]].item()
        assert out.sequences_scores[row].item() == pytest.approx(total, abs=1e-4)


def test_idle_beams_and_samples_are_those_of_the_full_cache() -> None:
    model, (ids, mask, _) = tiny("llama", "sdpa"), ragged()
    for options in (dict(num_beams=3), dict(do_sample=True), dict(num_return_sequences=1)):
        found = []
        for cache in (DynamicCache(), BoundedCache(model, "tova:budget=64")):
            torch.manual_seed(3)
            settings = OPTIONS | options
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
            found.append(out)
        assert torch.equal(*found)


@pytest.mark.parametrize("policy", POLICIES)
def test_prefix_reuse_reset_deepcopy_and_chunks(policy: str) -> None:
    model, ids = tiny("qwen3"), text(1, 14)
    cache = BoundedCache(model, policy)
    first = model.generate(ids, past_key_values=cache, **OPTIONS)
    assert cache.get_seq_length() == 23
    fork = copy.deepcopy(cache)
    # Without a mask transformers 5.23 feeds all ids again, whatever the cache.
    go_on = OPTIONS | dict(attention_mask=torch.ones_like(first))
    second = model.generate(first, past_key_values=cache, **go_on)
    assert cache.get_seq_length() == 33 and fork.get_seq_length() == 23
    assert torch.equal(model.generate(first, past_key_values=fork, **go_on), second)
    once = model.generate(
        ids,
        past_key_values=BoundedCache(model, policy),
        **(OPTIONS | dict(max_new_tokens=20, min_new_tokens=20)),
    )
    assert torch.equal(once, second)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **OPTIONS), first)
    pieces = model.generate(
        ids, past_key_values=BoundedCache(model, policy), prefill_chunk_size=4, **OPTIONS
    )
    assert torch.equal(pieces, first)


def test_calls_without_the_cache_never_notice() -> None:
    model, ids = tiny("mistral", "sdpa"), text(2)
    want = model(ids, use_cache=False).logits
    greedy = model.generate(ids, **OPTIONS)
    cache = BoundedCache(model, "tova:budget=5")
    for _ in range(2):
        model(ids, past_key_values=cache)
        assert torch.equal(model(ids, use_cache=False).logits, want)
        assert torch.equal(model.generate(ids, **OPTIONS), greedy)
        assert model.config._attn_implementation == "sdpa"
    assert len(model._forward_pre_hooks) == 1
    BoundedCache(model, "h2o:budget=5")
    assert len(model._forward_pre_hooks) == 1


def test_a_failed_call_leaves_the_model_as_it_was() -> None:
    model, ids = tiny("llama"), text()
    cache = BoundedCache(model, "tova:budget=5")
    with pytest.raises(IndexError):
        model(torch.full_like(ids, 99), past_key_values=cache)
    assert model.config._attn_implementation == "eager"
    fresh = BoundedCache(model, "tova:budget=5")
    assert model(ids, past_key_values=fresh).logits.isfinite().all()
    full = model(ids, use_cache=False).logits
    other = BoundedCache(model, "window:budget=64")
    assert (model(ids, past_key_values=other).logits - full).abs().max() < 1e-5 * full.abs().max()


def test_assisted_decoding_is_an_error() -> None:
    model, ids = tiny("llama"), text(1, 12)
    with pytest.raises((ValueError, TypeError)):
        model.generate(
            ids,
            assistant_model=tiny("llama", "sdpa"),
            past_key_values=BoundedCache(model, "tova:budget=5"),
            **OPTIONS,
        )
