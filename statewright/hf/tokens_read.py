"""What a cache has read, so that `generate` does not go on from it with another text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from statewright.token_hash import RollingHash

_BLOCK = 512


class TokensRead:
    """The ids that went through a cache, as a hash per row.

    On a CPU they are hashed at once; elsewhere a block at a time, so that decoding never waits for
    the device that they are on. A call whose ids are not seen (inputs_embeds, a compiled one)
    leaves `length` behind that of the cache, for good: nothing is then known.
    """

    def __init__(self) -> None:
        self.length = 0
        self._held: list[Tensor] = []
        self._width = 0
        self._hash: RollingHash | None = None
        self._rows: Tensor | None = None  # row i's hash is that of this row

    @property
    def num_rows(self) -> int:
        if self._held:
            return len(self._held[0])
        if self._rows is not None:
            return len(self._rows)
        return 0 if self._hash is None else self._hash.values.shape[1]

    def add(self, ids: Tensor | None) -> None:
        """Take in the ids (B, T) of a call; None where it had none."""
        if ids is None or torch.compiler.is_compiling():
            return
        self._held.append(ids if ids.is_cpu else ids.clone())
        self._width += ids.shape[1]
        self.length += ids.shape[1]
        if ids.is_cpu or self._width >= _BLOCK:
            self._fold()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, which may repeat."""
        if self._held:
            held = torch.cat(self._held, 1)
            self._held = [held[rows.to(held.device)]]
        if self._hash is not None:
            self._rows = rows if self._rows is None else self._rows[rows.to(self._rows.device)]

    def begins(self, ids: Tensor) -> bool:
        """Whether ids (B, S) begin with what was read."""
        self._fold()
        told = RollingHash(ids.shape[0])
        told.update(ids[:, : self.length].cpu().numpy())
        return self._hash is None or told.text == self._hash.text

    def _fold(self) -> None:
        if self._hash is not None and self._rows is not None:
            self._hash.select(self._rows.cpu().numpy())
            self._rows = None
        if not self._held:
            return
        ids = torch.cat(self._held, 1)
        self._held, self._width = [], 0
        if self._hash is None:
            self._hash = RollingHash(ids.shape[0])
        self._hash.update(ids.cpu().numpy())


def check_prompt(
    cache: Any, input_ids: Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse what transformers' `_prefill` would slice by the cache's length, whatever it says.

    input_ids as long as the mask are the whole text, of which only what is new is fed; shorter
    ones are new. ValueError for a whole text that does not go on from what the cache has read.
    """
    seen = cache.get_seq_length()
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    given = (input_ids if embeds is None else embeds).shape[1]
    covered = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
    if not seen or (embeds is None and covered != given):
        return
    read: TokensRead = cache.read
    known = embeds is None and read.length == seen
    if given <= seen or (known and not read.begins(input_ids)):
        rows = f" in {read.num_rows}" if known else ""
        name = "input_ids" if embeds is None else "inputs_embeds"
        raise ValueError(
            f"generate: {name} holds {given} tokens in {len(input_ids)} rows, but the "
            f"{type(cache).__name__} has seen {seen}{rows}, and they are not its continuation; "
            "to go on give all of them followed by the new ones, or the new ones alone with an "
            "attention_mask over all; for another text a new cache, or call cache.reset() first"
        )
