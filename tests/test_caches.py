"""Both caches of ours as callers of transformers use any: every method, and a second prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounded_models import text, tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from statewright.hf.arguments import CACHE
from statewright.hf.bounded import BoundedCache
from statewright.hf.cache import StateCache
from statewright.hf.tokens_read import TokensRead
from statewright.models import load

B, T = 3, 9
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
SPECIAL = ["__len__", "__iter__", "__contains__", "__getitem__", "__repr__"]
# What these calls would ask of a cache has no meaning for a state that is never cut back.
REFUSED = {
    "BoundedCache": {"__iter__", "crop", "offload", "prefetch", "update", "update_indexer"},
    "StateCache": {
        "__iter__",
        "activate_past_recording",
        "crop",
        "early_initialization",
        "get_conv_state",
        "get_recurrent_state",
        "offload",
        "prefetch",
        "update",
        "update_conv_state",
        "update_indexer",
        "update_recurrent_state",
    },
}
# A list that has lost tokens cannot be cut back; before the first call a State has no layers; rows
# are known where a cache has a State.
BY_DESIGN = {"is_croppable", "__len__", "is_linear", "is_dummy", "is_sliding", "batch_size"}
OURS = pytest.mark.parametrize("kind", REFUSED)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One Llama, run by transformers and by us: what a cache does shows in the logits."""
    directory = tmp_path_factory.mktemp("llama")
    theirs = tiny("llama", "sdpa")
    theirs.save_pretrained(directory)
    return {"BoundedCache": theirs, "StateCache": load(directory, torch.float64)}


def empty(kind: str, models: dict[str, Any]) -> Cache:
    return StateCache() if kind == "StateCache" else BoundedCache(models[kind], "window:budget=64")


@torch.no_grad()
def filled(model: Any, cache: Cache) -> Cache:
    model(text(B, T), **{CACHE: cache})
    return cache


def arguments(method: Callable) -> dict[str, Any]:
    """By the names that transformers gives them; a new one is to be added here."""
    x = torch.zeros(B, 2, 1, 8, dtype=torch.float64)
    known = dict(
        layer_idx=0, state_idx=0, query_length=2, repeats=2, tokens_to_remove=2, batch_size=B
    )
    known |= dict(num_heads=2, head_dim=8, dtype=torch.float64, device=torch.device("cpu"))
    known |= dict(beam_idx=torch.tensor([2, 0, 0]), indices=torch.tensor([1, 2]))
    known |= dict.fromkeys(("key_states", "value_states", "indexer_key_states"), x)
    known |= dict.fromkeys(("conv_states", "recurrent_states"), x)
    asked = inspect.signature(method).parameters.values()
    needed = (p for p in asked if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    return {p.name: known[p.name] for p in needed}


def outcome(cache: Cache, name: str, model: Any) -> tuple[Any, Any]:
    """What a member gives, or raises, and what the model then says to one more token."""
    try:
        found = getattr(cache, name)
        told = found(**arguments(found)) if callable(found) else found
    except (AttributeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        return error, None
    rows = text(B, 1, seed=2)[:1].expand(rows_of(cache), 1)
    with torch.no_grad():
        return told, model(rows, **{CACHE: cache}).logits


def rows_of(cache: Cache) -> int:
    if isinstance(cache, StateCache):
        return B if cache.state is None else cache.state.batch_size
    keys = cache.layers[0].keys if len(cache) else None
    return B if keys is None or keys.dim() != 4 else len(keys)


def members() -> list[str]:
    return [name for name in dir(Cache) if not name.startswith("_")] + SPECIAL


@OURS
@pytest.mark.parametrize("full", [True, False], ids=["filled", "empty"])
@pytest.mark.parametrize("name", members())
def test_members_are_those_of_dynamic_cache_or_say_why_not(
    name: str, full: bool, kind: str, models: dict[str, Any]
) -> None:
    theirs, model = models["BoundedCache"], models[kind]
    peer, cache = DynamicCache(config=theirs.config), empty(kind, models)
    if full:
        filled(theirs, peer)
        filled(model, cache)
    want, after = outcome(peer, name, theirs)
    got, mine = outcome(cache, name, model)
    if isinstance(got, Exception):
        # A special method that no cache has is the language's own error.
        known = type(got) is type(want) and str(got) == str(want).replace("Dynamic", "Bounded")
        known = known or (name in SPECIAL and not hasattr(peer, name))
        says = isinstance(got, (ValueError, NotImplementedError)) and name in str(got)
        assert known or (says and name in REFUSED[kind]), repr(got)
    elif not isinstance(want, Exception):
        assert type(got) is type(want)
        assert got == want or not isinstance(got, (bool, int, tuple, list)) or name in BY_DESIGN
        assert mine.shape == after.shape and (mine - after).abs().max() < 1e-5


def test_nothing_is_refused_that_has_a_meaning() -> None:
    assert all(refused <= set(members()) for refused in REFUSED.values())
    works = {"batch_repeat_interleave", "batch_select_indices", "get_mask_sizes", "get_seq_length"}
    works |= {"reorder_cache", "reset", "is_initialized", "get_max_length", "batch_size"}
    assert works <= set(members()) and not any(refused & works for refused in REFUSED.values())


def prompts(whole: Tensor) -> dict[str, Tensor]:
    """Second prompts for a cache that has seen whole but for its last token."""
    seen = whole.shape[1] - 1
    more = torch.cat([whole, text(len(whole), 4, seed=3)], 1)
    other = more.clone()
    other[1, 2] = 3 + (other[1, 2] - 2) % 37
    return {
        "half": more[:, : seen // 2],
        "shorter": more[:, : seen - 2],
        "all that it has seen": more[:, :seen],
        "another": other,
        "other rows": more.flip(0),
        "fewer rows": more[:2],
    }


@OURS
@pytest.mark.parametrize("masked", [True, False])
def test_generate_refuses_what_is_no_continuation(masked: bool, kind: str, models: Any) -> None:
    model, cache = models[kind], empty(kind, models)
    whole = model.generate(text(B, T), **{CACHE: cache}, **GREEDY)
    for name, ids in prompts(whole).items():
        options = dict(attention_mask=torch.ones_like(ids)) if masked else {}
        says = rf"{ids.shape[1]} tokens in {len(ids)} rows.*has seen 11 in 3, .*cache.reset\(\)"
        with pytest.raises(ValueError, match=says):
            model.generate(ids, **{CACHE: cache}, **options, **GREEDY)
        assert cache.get_seq_length() == 11, name


@OURS
def test_generate_goes_on_from_a_filled_cache(kind: str, models: Any) -> None:
    model, cache = models[kind], empty(kind, models)
    whole = model.generate(text(B, T), **{CACHE: cache}, **GREEDY)
    more = torch.cat([whole, text(B, 4, seed=3)], 1)
    mask = torch.ones_like(more)
    want = model.generate(more, attention_mask=mask, **GREEDY)
    for ids in (more, more[:, 11:]):
        branch = copy.deepcopy(cache)
        got = model.generate(ids, attention_mask=mask, **{CACHE: branch}, **GREEDY)
        assert torch.equal(got[:, -3:], want[:, -3:])
    rows = torch.tensor([2, 0, 0])
    for name, given in (("reorder_cache", rows), ("batch_select_indices", rows)):
        branch = copy.deepcopy(cache)
        getattr(branch, name)(given)
        with pytest.raises(ValueError, match="not its continuation"):
            model.generate(more, attention_mask=mask, **{CACHE: branch}, **GREEDY)
        got = model.generate(more[rows], attention_mask=mask, **{CACHE: branch}, **GREEDY)
        assert torch.equal(got, want[rows])
    cache.batch_repeat_interleave(2)
    twice = dict(num_return_sequences=2, do_sample=False, num_beams=2)
    got = model.generate(more, attention_mask=mask, **{CACHE: cache}, **(GREEDY | twice))
    assert torch.equal(got, model.generate(more, attention_mask=mask, **(GREEDY | twice)))
    cache.reset()
    assert torch.equal(model.generate(text(B, T), **{CACHE: cache}, **GREEDY), whole)


@OURS
def test_embeddings_cannot_be_compared(kind: str, models: Any) -> None:
    """By their number alone."""
    model, cache, ids = models[kind], empty(kind, models), text(1, T)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        model(inputs_embeds=embeds, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"inputs_embeds holds 9 tokens.*has seen 9"):
        model.generate(inputs_embeds=embeds, **{CACHE: cache}, **GREEDY)
    more = torch.cat([ids + 1, text(1, 2)], 1)
    model.generate(more, attention_mask=torch.ones_like(more), **{CACHE: cache}, **GREEDY)


@pytest.mark.parametrize("sizes", [[1] * 1200, [700, 1, 1, 512, 3], [511, 1, 1], [0, 5, 0]])
def test_what_was_read_is_known_however_it_was_split(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, (B, sum(sizes)), generator=generator)
    read, chosen = TokensRead(), torch.arange(B)
    for i, piece in enumerate(ids.split(sizes, 1)):
        read.add(piece[chosen])
        if i % 300 == 1:
            rows = torch.randint(len(chosen), (4,), generator=generator)
            read.select(rows)
            chosen = chosen[rows]
    assert read.length == ids.shape[1] and read.num_rows == len(chosen)
    assert read.begins(torch.cat([ids, ids], 1)[chosen])
    for column in (0, ids.shape[1] // 2, ids.shape[1] - 1):
        other = ids[chosen].clone()
        other[-1, column] += 1
        assert not read.begins(other)
    assert sum(len(piece) for piece in read._held) <= 512 * len(chosen)
