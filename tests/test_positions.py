"""position_ids that begin no document: padding, chunks, beams and caches, as callers count them."""

from __future__ import annotations

import pytest
import torch
from packed_models import SPECS, TOLERANCE, build, counted, documents
from torch import Tensor
from transformers import GenerationMixin

from statewright import laws
from statewright.hf.cache import StateCache


@pytest.mark.parametrize("fill", [0, 1, 7])
@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=2), dict(num_beams=2)])
@pytest.mark.parametrize("name", ["mingru", "attention"])
def test_positions_from_a_mask_begin_nothing(name: str, options: dict, fill: int) -> None:
    """Left padding as callers count it: cumsum of the mask, padding filled with anything."""
    model, (text, other) = build(SPECS[name]), documents([8, 8])
    ids, mask = torch.stack([text, other]), torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    options = dict(options, attention_mask=mask, max_new_tokens=6, do_sample=False)
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, position_ids=positions, **options), want)
    columns = torch.arange(8).expand(2, 8)
    assert torch.equal(model.generate(ids, position_ids=columns, **options), want)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


def test_masked_tokens_have_no_position() -> None:
    """Holes are jumped over; a document whose first token is masked begins at the next."""
    model, ids = build("attention"), documents([6])[0][None]
    mask = torch.tensor([[1, 1, 0, 1, 0, 1]])
    want = model(ids, attention_mask=mask).logits
    for fill in (0, 9):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, want)
    numbers = torch.tensor([[0, 0, 1, 1, 1, 1]])
    reset = torch.tensor([[0, 0, 0, 1, 0, 0]])
    got = model(ids, attention_mask=mask, seq_idx=numbers)
    assert torch.equal(got.logits, model(ids, attention_mask=mask, reset=reset).logits)
    assert got.state.seen.tolist() == [2]


@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=3), dict(num_beams=2)])
def test_positions_that_generate_makes_begin_nothing(monkeypatch, options: dict) -> None:
    """transformers would count them from the mask or the cache; ours leaves them out."""
    model, (text, more) = build(["gru", "attention"]), documents([8, 3])
    ids, mask = text.expand(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0
    state = model(ids[:, :4]).state
    options = dict(options, max_new_tokens=4, do_sample=False)

    def written() -> list[Tensor]:
        cache = StateCache()
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        turn = torch.cat([first, more.expand(len(first), 3)], 1)
        if "num_beams" in options:  # its rows have read the beams, not what came out best
            cache.reset()
        longer = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1)
        second = model.generate(turn, attention_mask=longer, past_key_values=cache, **options)
        return [first, second, model.generate(ids[:, 4:], state=state, **options)]

    want, sent = written(), []
    monkeypatch.setattr(
        type(model),
        "_prepare_position_ids_for_generation",
        GenerationMixin._prepare_position_ids_for_generation,
    )
    hook = model.register_forward_pre_hook(
        lambda module, args, given: sent.append(given.get("position_ids")), with_kwargs=True
    )
    got = written()
    hook.remove()
    assert sent and all(positions is not None for positions in sent)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [None, 5, 6, 17])
@pytest.mark.parametrize("name", ["mamba", "attention"])
def test_generation_goes_on_with_the_last_document(name: str, size: int | None) -> None:
    """Also where a chunk of the prompt ends with a document (5, 6)."""
    model, texts = build(SPECS[name]), documents([5, 1, 9, 7])
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True)

    def logits(ids: Tensor, **more) -> Tensor:
        out = model.generate(ids, return_dict_in_generate=True, **options, **more)
        return torch.stack(out.logits)

    want = logits(texts[-1][None])
    ids, positions = torch.cat(texts)[None], counted([5, 1, 9, 7])
    got = logits(ids, position_ids=positions, prefill_chunk_size=size)
    assert laws.error(got, want) < TOLERANCE
    assert laws.error(logits(ids), want) > 1e-3


def test_positions_counted_from_a_state_or_within_its_cache() -> None:
    """A cache made from a state counts its own tokens; transformers counts as it does."""
    model, (old, new) = build("attention"), documents([6, 4])
    state, new = model(old[None]).state, new[None]
    want = model(new, state=state).logits
    cache = StateCache(state)
    for t in range(4):
        out = model(new[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]]))
        assert laws.error(out.logits, want[:, t : t + 1]) < TOLERANCE
    onwards = torch.arange(6, 10)[None]
    out = model(new, past_key_values=StateCache(state), position_ids=onwards)
    assert laws.error(out.logits, want) < TOLERANCE
    options = dict(max_new_tokens=5, do_sample=False)
    want = model.generate(new, state=state, **options)
    got = model.generate(new, state=state, position_ids=torch.arange(4)[None], **options)
    assert torch.equal(got, want)
