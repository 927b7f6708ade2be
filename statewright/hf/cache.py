"""The box in which transformers' `generate` carries our immutable State from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
import torch.utils._pytree as pytree
from transformers.cache_utils import Cache

from statewright.hf.tokens_read import TokensRead
from statewright.state import ModelState


def _per_layer(name: str) -> Callable[..., NoReturn]:
    def refuse(self: StateCache, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(
            f"StateCache.{name}: the layers' tensors are a State, which is never written to; read "
            "cache.state.layers[i], and go on from another state with StateCache(state)"
        )

    return refuse


class StateCache(Cache):
    """Holds one `state` (None at first) and counts the tokens fed through this cache.

    `generate` replaces the state after every call and asks for rows when it reorders beams; the
    State itself is never written to, so `copy.deepcopy` and forks of a cache are independent.
    `StateCache(state)` continues from a state: the ids given to `generate` are then the new
    tokens only, and the count starts at 0. len: the model's layers (0 before the first call).

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> out = model(torch.randint(256, (1, 20)))
    >>> cache = StateCache(out.state)
    >>> model.generate(torch.tensor([[7]]), past_key_values=cache, max_new_tokens=4).shape
    torch.Size([1, 5])
    """

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.num_tokens = 0
        self.read = TokensRead()

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"StateCache({self.num_tokens} tokens, {self.state!r})"

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.state is None else self.state.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed through this cache; `generate` slices the ids it has not seen by it."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no cache of ours ends."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask over all tokens fed and `query_length` new ones, and its offset 0."""
        return self.num_tokens + query_length, 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        return self.is_initialized

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def advance(self, state: ModelState, num_tokens: int, ids: torch.Tensor | None = None) -> None:
        """Store the state after `num_tokens` more tokens, whose ids these are."""
        self.state = state
        self.num_tokens += num_tokens
        self.read.add(ids)

    def reset(self) -> None:
        self.state, self.num_tokens, self.read = None, 0, TokensRead()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size).repeat_interleave(repeats)
            self._rows(rows)

    def crop(self, *args: object, **kwargs: object) -> None:
        raise ValueError(
            "StateCache.crop: a recurrent state cannot forget its last tokens; keep an earlier "
            "State and continue from it (assisted decoding needs cropping and is not supported)"
        )

    update = _per_layer("update")
    update_conv_state = _per_layer("update_conv_state")
    update_recurrent_state = _per_layer("update_recurrent_state")
    update_indexer = _per_layer("update_indexer")
    activate_past_recording = _per_layer("activate_past_recording")
    get_conv_state = _per_layer("get_conv_state")
    get_recurrent_state = _per_layer("get_recurrent_state")
    early_initialization = _per_layer("early_initialization")
    offload = _per_layer("offload")
    prefetch = _per_layer("prefetch")
    __iter__ = _per_layer("__iter__")

    def _rows(self, index: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.rows(index)
            self.read.select(index)

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_linear(self) -> list[bool]:
        """Not linear: since 5.24 `generate` asks only other caches which ids they have seen."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False


def _flatten(cache: StateCache) -> tuple[list, int]:
    return [cache.state], cache.num_tokens


def _unflatten(values: Iterable, num_tokens: int) -> StateCache:
    cache = StateCache(*values)
    cache.num_tokens = num_tokens
    return cache


# What torch.export, FSDP and tree_map see of a cache that a call returns.
pytree.register_pytree_node(
    StateCache, _flatten, _unflatten, serialized_type_name="statewright.StateCache"
)
