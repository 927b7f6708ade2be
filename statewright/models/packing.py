"""Documents packed in one row, in transformers' words: positions, indices, cumulative lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """The tokens of one forward: mask (B, T) or None, and what came before them.

    seen (B,): each row's tokens since its document began; fed: the columns that a cache took in
    before (None: no cache); fresh: whether every row begins here.
    """

    batch_size: int
    num_tokens: int
    mask: Tensor | None
    seen: Tensor
    fed: int | None
    fresh: bool


def document_starts(
    reset: Tensor | None, position_ids: Tensor | None, packing: Mapping[str, Any], call: Call
) -> Tensor | None:
    """(B, T) bool: a document begins at this token, as any of these say; None if none begins.

    reset (B, T) is the answer itself. position_ids (B, T) or (1, T) count a document's unmasked
    tokens from 0; the first of a call goes on from what came before or is 0. seq_idx (B, T) or
    (1, T) numbers documents. cu_seq_lens_q, cu_seq_lens_k (documents + 1,) are their bounds in a
    batch of one row; max_length_q and _k follow from them. Raises ValueError for positions that
    are neither the next nor 0, shapes that do not fit, and keywords that disagree (compiled code
    cannot look at values: it checks shapes alone).
    """
    reset = None if reset is None else reset.bool()
    numbers = _numbers(packing, call) if packing else {}
    if position_ids is None and not numbers:
        return reset
    if position_ids is None and not call.fresh:
        raise ValueError(
            f"forward: {next(iter(numbers))} does not say whether the first document goes on from "
            "the state; give position_ids or reset"
        )
    previous = _previous(call)
    inside = previous >= 0 if call.mask is None else (previous >= 0) & call.mask
    found = {
        name: (own != own.gather(1, previous.clamp(min=0))) & inside
        for name, own in numbers.items()
    }
    if position_ids is not None:
        positions = _rows("position_ids", position_ids, call)
        found["position_ids"] = _restarts(positions, previous, call)
    (name, starts), *others = reversed(found.items())
    if not torch.compiler.is_compiling():
        for other, theirs in others:
            if not torch.equal(starts & inside, theirs):
                raise ValueError(
                    f"forward: {other} and {name} disagree about where documents begin"
                )
        if not bool(starts.any()):
            return reset
    return starts if reset is None else starts | reset


def _restarts(positions: Tensor, previous: Tensor, call: Call) -> Tensor:
    """Unmasked tokens at position 0 that do not go on from what came before."""
    first, seen = previous < 0, call.seen.unsqueeze(1)
    goes_on = positions == seen
    if call.fed is not None:
        goes_on = goes_on | (positions == call.fed)
    follows = positions == positions.gather(1, previous.clamp(min=0)) + 1
    follows = torch.where(first, goes_on, follows)
    # Rotations know differences alone, so a row that begins may begin at any position.
    wrong = ~(follows | (positions == 0) | (first & (seen == 0)))
    restarts = (positions == 0) & ~follows
    if call.mask is not None:
        wrong, restarts = wrong & call.mask, restarts & call.mask
    if not torch.compiler.is_compiling() and bool(wrong.any()):
        row, at = wrong.nonzero()[0].tolist()
        before = previous[row, at]
        expected = call.seen[row] if before < 0 else positions[row, before] + 1
        raise ValueError(
            f"forward: position_ids[{row}, {at}] is {positions[row, at].item()}, expected "
            f"{expected.item()} (the row goes on) or 0 (a document begins)"
        )
    return restarts


def _previous(call: Call) -> Tensor:
    """(B, T): the column of the unmasked token before this one, -1 if there is none."""
    columns = torch.arange(call.num_tokens, device=call.seen.device)
    columns = columns.expand(call.batch_size, -1)
    if call.mask is not None:
        columns = torch.where(call.mask, columns, -1).cummax(1).values
    before = torch.cat([columns.new_full((call.batch_size, 1), -1), columns], 1)
    return before[:, : call.num_tokens]


def _numbers(packing: Mapping[str, Any], call: Call) -> dict[str, Tensor]:
    """By keyword: a number per document, (B, T)."""
    found = {}
    if packing.get("seq_idx") is not None:
        found["seq_idx"] = _rows("seq_idx", packing["seq_idx"], call)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if packing.get(name) is not None:
            found[name] = _between(name, packing[name].to(call.seen.device), call)
    return found


def _between(name: str, bounds: Tensor, call: Call) -> Tensor:
    T = call.num_tokens
    if call.batch_size != 1 or bounds.dim() != 1:
        raise ValueError(
            f"forward: {name} is {tuple(bounds.shape)} for {call.batch_size} rows, expected "
            "(documents + 1,) for one row"
        )
    if not torch.compiler.is_compiling():
        values = bounds.tolist()
        if values != sorted(values) or values[:1] != [0] or values[-1] != T:
            raise ValueError(f"forward: {name} is {values}, expected it to rise from 0 to {T}")
    columns = torch.arange(T, device=bounds.device, dtype=bounds.dtype)
    return torch.bucketize(columns, bounds, right=True).unsqueeze(0)


def _rows(name: str, given: Tensor, call: Call) -> Tensor:
    B, T = call.batch_size, call.num_tokens
    if given.dim() != 2 or given.shape[0] not in (1, B) or given.shape[1] != T:
        raise ValueError(f"forward: {name} is {tuple(given.shape)}, expected (B, T) = ({B}, {T})")
    return given.expand(B, T)
