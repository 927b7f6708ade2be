"""One way to call a causal LM with its cache: transformers' models raw, and ours.

A check must see what a user of the model sees, so transformers' caches are handed on as they are,
with the positions and masks that `generate` would pass; nothing is corrected here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from statewright.hf.arguments import by_name, is_recurrent
from statewright.hf.bridge import read_state, write_state
from statewright.hf.host import RawModel
from statewright.precision import device_of
from statewright.state import State


class Unsupported(Exception):
    """The model offers no way to do this, so nothing can be wrong; the reason is the message."""


class HostRunner:
    """A transformers model as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.raw = model, RawModel(model)
        self.name, self.vocabulary = self.raw.name, self.raw.text_config.vocab_size
        self.random_ids = self.raw.random_ids

    def read(
        self,
        ids: Tensor | None,
        cache: Any = None,
        start: int | Tensor = 0,
        mask: Tensor | None = None,
        positions: Tensor | bool = True,
        embeds: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """ids (B, T) or embeds (B, T, D) after a cache -> logits (B, T, vocabulary), the cache.

        mask (B, S) covers everything read so far and these tokens, as `generate` passes it.
        """
        kwargs = {} if embeds is None else {"inputs_embeds": embeds}
        if mask is not None:
            self._accepts("attention_mask")
            # `generate` gives models without attention no mask once they have a cache.
            if cache is None or not is_recurrent(cache):
                kwargs["attention_mask"] = mask.long()
        return self.raw(ids, cache, start, positions, **kwargs)

    def packed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of several documents in one row; a document begins where positions are 0."""
        self._accepts("position_ids")
        return self.model(
            input_ids=ids, position_ids=positions, use_cache=False, **by_name(self.model)
        ).logits

    def _accepts(self, argument: str) -> None:
        """A model that swallows an argument it ignores is tried: its users get no error either."""
        parameters = inspect.signature(self.model.forward).parameters
        if argument not in parameters and not any(
            p.kind is p.VAR_KEYWORD for p in parameters.values()
        ):
            raise Unsupported(f"the model takes no {argument}")

    def state(self, cache: Any, seen: int) -> State:
        return read_state(cache, self.model.config, seen)

    def cache(self, state: State, like: Any) -> Any:
        return write_state(state, self.model, like)

    def reorder(self, cache: Any, rows: Tensor) -> Any:
        if not hasattr(cache, "reorder_cache"):
            raise Unsupported(f"a {type(cache).__name__} has no reorder_cache")
        cache.reorder_cache(rows)
        return cache

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)


class OwnRunner(HostRunner):
    """Our own model: the cache is a State, positions are the state's affair."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.name = model, type(model).__name__
        self.vocabulary = model.config.vocab_size

    def random_ids(self, batch_size: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        first = min(3, self.vocabulary - 1)
        ids = torch.randint(first, self.vocabulary, (batch_size, length), generator=generator)
        return ids.to(device_of(self.model))

    def read(self, ids, cache=None, start=0, mask=None, positions=True, embeds=None):
        out = self.model(
            ids, state=cache, attention_mask=mask, inputs_embeds=embeds, **by_name(self.model)
        )
        return out.logits, out.state

    def packed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(ids, position_ids=positions, **by_name(self.model)).logits

    def state(self, cache: Any, seen: int) -> State:
        return cache

    def cache(self, state: State, like: Any) -> Any:
        return state

    def reorder(self, cache: Any, rows: Tensor) -> Any:
        return cache.rows(rows)


def runner_of(model: nn.Module) -> HostRunner:
    """The runner for a model; ValueError for one without a cache."""
    return OwnRunner(model) if hasattr(model, "init_state") else HostRunner(model)
