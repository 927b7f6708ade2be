"""The box in which transformers' `generate` carries our immutable State from call to call."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from statewright.state import ModelState


class StateCache(Cache):
    """Holds one `state` (None at first) and counts the tokens fed through this cache.

    `generate` replaces the state after every call and asks for rows when it reorders beams; the
    State itself is never written to, so `copy.deepcopy` and forks of a cache are independent.
    `StateCache(state)` continues from a state: the ids given to `generate` are then the new
    tokens only, and the count starts at 0.
    """

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.num_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed through this cache; `generate` slices the ids it has not seen by it."""
        return self.num_tokens

    def advance(self, state: ModelState, num_tokens: int) -> None:
        """Store the state after `num_tokens` more tokens."""
        self.state = state
        self.num_tokens += num_tokens

    def reset(self) -> None:
        self.state, self.num_tokens = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size).repeat_interleave(repeats)
            self._rows(rows)

    def crop(self, *args, **kwargs) -> None:
        raise ValueError(
            "StateCache.crop: a recurrent state cannot forget its last tokens; keep an earlier "
            "State and continue from it (assisted decoding needs cropping and is not supported)"
        )

    def _rows(self, index: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.rows(index)

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False
