"""`generate` with a State: transformers' loop, our cache."""

from __future__ import annotations

from typing import NoReturn

import torch
from transformers import GenerationMixin

from statewright.hf.arguments import CACHE, NAMES, cache_in
from statewright.hf.cache import StateCache
from statewright.hf.tokens_read import check_prompt
from statewright.state import ModelState


class StateGenerationMixin(GenerationMixin):
    """transformers' `generate`, whose cache is a `StateCache` and which takes `state=`."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """`generate(ids, state=state)`: the ids are the tokens that come after the state."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"generate: cache_implementation={kind!r} is not supported; the only cache is the "
                "State ('dynamic'), whose lists grow with the text unless a policy bounds them"
            )
        state = model_kwargs.pop("state", None)
        cache = cache_in(model_kwargs)
        for name in NAMES:
            model_kwargs.pop(name, None)
        if cache is not None:
            model_kwargs[CACHE] = cache
        if cache is not None or generation_config.use_cache is False:
            if state is not None:
                raise ValueError("generate: state= needs use_cache and no other cache")
            return
        if state is not None:
            if not isinstance(state, ModelState):
                raise ValueError(f"generate: state is {state!r}, expected a ModelState")
            if state.batch_size != batch_size:
                raise ValueError(
                    f"generate: the state has {state.batch_size} rows, the ids {batch_size}"
                )
            repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
            if repeats > 1:
                state = state.rows(torch.arange(batch_size).repeat_interleave(repeats))
        model_kwargs[CACHE] = StateCache(state)

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        raise ValueError(
            "generate_batch: continuous batching pages lists of keys and values, which a State is "
            "not; give generate a padded batch, or each text its own state"
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:
        """None: a State counts its rows' tokens itself; only the caller's positions are read."""

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """transformers cuts ids by the cache's length, whatever the cache has read."""
        cache = cache_in(model_kwargs)
        if isinstance(cache, StateCache):
            check_prompt(cache, input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """transformers takes any output called `state` for RWKV's cache; ours is in the cache."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        model_kwargs.pop("state", None)
        return model_kwargs
