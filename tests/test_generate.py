"""`generate` with a state in a cache: always what it gives when every token is read again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from statewright import laws
from statewright.hf.cache import StateCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM

V, B, T, NEW = 29, 3, 9, 12
MIXERS = ["mingru", ["minlstm:expansion=2", "gru", "mingru:form=vanilla"]]
each = pytest.mark.parametrize("mixer", MIXERS, ids=["mingru", "hybrid"])
GREEDY = dict(max_new_tokens=NEW, do_sample=False)
MODES = {
    "greedy": GREEDY,
    "sampling": dict(GREEDY, do_sample=True, top_k=0),
    "samples": dict(GREEDY, do_sample=True, num_return_sequences=2),
    "beams": dict(GREEDY, num_beams=3),
    "all beams": dict(GREEDY, num_beams=3, num_return_sequences=3),
    "sampled beams": dict(GREEDY, num_beams=3, do_sample=True, num_return_sequences=2),
}
modes = pytest.mark.parametrize("mode", MODES)


def build(mixer="mingru") -> StatewrightForCausalLM:
    config = StatewrightConfig(
        vocab_size=V, hidden_size=8, num_hidden_layers=3, mlp_ratio=2.0, mixer=mixer
    )
    model = StatewrightForCausalLM(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def tokens(batch: int = B, length: int = T) -> Tensor:
    return torch.randint(V, (batch, length))


def generate(model, ids: Tensor, **options) -> Tensor:
    torch.manual_seed(5)
    return model.generate(ids, **{**GREEDY, **options})


@each
@modes
def test_cached_is_uncached(mixer, mode: str) -> None:
    model, ids, options = build(mixer), tokens(), MODES[mode]
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (B * options.get("num_return_sequences", 1), T + NEW)
    assert len(set(cached[:, T:].flatten().tolist())) > 4


@modes
def test_from_a_state_the_ids_are_only_the_new_ones(mode: str) -> None:
    model, ids, options = build(MIXERS[1]), tokens(), MODES[mode]
    state = model(ids[:, :6]).state
    before = state.map(torch.clone)
    continued = generate(model, ids[:, 6:], state=state, **options)
    assert torch.equal(continued[:, T - 6 :], generate(model, ids, **options)[:, T:])
    assert laws.error(state, before) == 0.0


@each
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_left_padded_rows_are_the_rows_alone(mixer, mode: str) -> None:
    model, ids, mask = build(mixer), tokens(), torch.ones(B, T, dtype=torch.long)
    mask[0, :4], mask[2, :8] = 0, 0
    together = generate(model, ids, attention_mask=mask, **MODES[mode])
    for row in range(B):
        alone = ids[row : row + 1, mask[row].bool()]
        want = generate(model, alone, **MODES[mode])[0, alone.shape[1] :]
        assert torch.equal(together[row, T:], want)


@each
@pytest.mark.parametrize("size", [1, 4, 9, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_in_chunks(mixer, size: int, padded: bool) -> None:
    model, ids, mask = build(mixer), tokens(), torch.ones(B, T, dtype=torch.long)
    if padded:
        mask[1, :5] = 0
    want = generate(model, ids, attention_mask=mask)
    got = generate(model, ids, attention_mask=mask, prefill_chunk_size=size)
    assert torch.equal(got, want)


def test_prefill_in_chunks_from_a_state() -> None:
    model, ids = build(), tokens()
    state = model(ids[:, :2]).state
    got = generate(model, ids[:, 2:], state=state, prefill_chunk_size=3)
    assert torch.equal(got[:, T - 2 :], generate(model, ids)[:, T:])


@each
def test_a_second_turn_with_the_same_cache(mixer) -> None:
    """The ids are then everything so far and what is new, as for any cache of transformers."""
    model, ids, cache = build(mixer), tokens(), StateCache()
    first = generate(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == T + NEW - 1
    everything = torch.cat([first, tokens(B, 5)], 1)
    second = generate(model, everything, past_key_values=cache)
    assert torch.equal(second, generate(model, everything))
    again = generate(model, second, past_key_values=cache)
    assert torch.equal(again, generate(model, second))
    assert cache.state.seen.tolist() == [cache.get_seq_length()] * B


@pytest.mark.parametrize("length", [T - 1, T])
def test_a_cache_that_is_ahead_of_the_ids_is_refused(length: int) -> None:
    """transformers would feed the ids a second time, without a word."""
    model, ids, cache = build(), tokens(), StateCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=rf"{length} tokens.*has seen {T}"):
        generate(model, ids[:, :length], past_key_values=cache)
    new, cache = tokens(B, 2), StateCache(cache.state)
    want = generate(model, torch.cat([ids, new], 1))[:, T:]
    assert torch.equal(generate(model, new, past_key_values=cache), want)


def test_copies_of_a_cache_are_forks() -> None:
    model, ids, cache = build(), tokens(), StateCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    fork, kept = copy.deepcopy(cache), cache.state
    one, other = tokens(B, 4), tokens(B, 4)
    for branch, more in ((cache, one), (fork, other)):
        prompt = torch.cat([ids[:, :5], more], 1)
        assert torch.equal(generate(model, prompt, past_key_values=branch), generate(model, prompt))
    assert laws.error(kept, model(ids[:, :5]).state) == 0.0


def test_rows_of_a_cache() -> None:
    model, ids = build(), tokens()
    cache = StateCache(model(ids).state)
    state = cache.state
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert laws.error(cache.state, state.rows([2, 0, 0])) == 0.0
    cache.batch_select_indices(torch.tensor([0]))
    assert laws.error(cache.state, state.rows(2)) == 0.0
    cache.batch_repeat_interleave(3)
    assert laws.error(cache.state, state.rows([2, 2, 2])) == 0.0
    assert cache.is_initialized and not cache.is_compileable
    cache.reset()
    assert cache.state is None and cache.get_seq_length() == 0 and not cache.is_initialized
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.state is None


def test_generation_from_embeddings() -> None:
    model, ids = build(), tokens()
    embedded = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embedded, **GREEDY)
    assert torch.equal(got, generate(model, ids)[:, T:])


def test_outputs_of_generation() -> None:
    model, ids = build(), tokens()
    out = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        **GREEDY,
    )
    assert torch.equal(out.sequences, generate(model, ids))
    logits = torch.stack(out.logits, 1)
    assert laws.error(logits.double(), model(out.sequences[:, :-1]).logits[:, T - 1 :]) < 1e-6
    assert isinstance(out.past_key_values, StateCache) and len(out.hidden_states) == NEW
    assert laws.error(out.past_key_values.state, model(out.sequences[:, :-1]).state) < 1e-12


def test_stopping_at_the_end_token() -> None:
    """A row that is done is padded; its neighbours go on as if alone."""
    model, ids = build(), tokens()
    free = generate(model, ids)
    end = free[0, T + 3].item()
    mask = torch.ones_like(ids)
    stopped = generate(model, ids, attention_mask=mask, eos_token_id=end, pad_token_id=V - 1)
    for row in range(B):
        written = free[row, T:].tolist()
        keep = written.index(end) + 1 if end in written else NEW
        width = stopped.shape[1] - T
        want = (written[:keep] + [V - 1] * NEW)[:width]
        assert stopped[row, T:].tolist() == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda m: dict(state=m.init_state(2)), "the state has 2 rows, the ids 3"),
        (lambda m: dict(state=m.init_state(B), use_cache=False), "state= needs use_cache"),
        (lambda m: dict(state=m.init_state(B), past_key_values=StateCache()), "no other cache"),
        (lambda m: dict(past_key_values=StateCache(m.init_state(2))), "has 2 rows, the input 3"),
        (lambda m: dict(state=m.init_state(B).layers[0]), "expected a ModelState"),
        (lambda m: dict(state=7), "expected a ModelState"),
    ],
)
def test_mistakes_are_named(options, message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(), **options(model))


def test_assisted_decoding_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, tokens(1), assistant_model=build())
