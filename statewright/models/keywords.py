"""Keywords of a forward: what is known passes, what asks for anything else is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

LOSS_KEYWORDS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
PACKING_KEYWORDS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
FLAGS = ("donate", "output_attentions")
MODEL_KEYWORDS = ("use_cache", "output_hidden_states", *FLAGS, *PACKING_KEYWORDS)


def split_keywords(
    caller: str, given: Mapping[str, Any], *groups: Collection[str]
) -> tuple[dict[str, Any], ...]:
    """One dict per group of names: the entries of `given` that the group knows.

    A keyword of no group is ignored if its value is None or False: a newer transformers sends
    keywords that we do not know, at their defaults. Raises ValueError naming any other.
    """
    known = frozenset().union(*groups)
    unknown = [
        name
        for name, value in given.items()
        if name not in known and value is not None and value is not False
    ]
    if unknown:
        raise ValueError(
            f"{caller}: unknown keyword {', '.join(sorted(unknown))}; beside its named arguments "
            f"it takes {', '.join(sorted(known))}"
        )
    return tuple({name: given[name] for name in group if name in given} for group in groups)


def refuse_attentions(asked: bool | None, config: PreTrainedConfig) -> None:
    """ValueError if the call, or by default the config, asks for attention weights."""
    if config.output_attentions if asked is None else asked:
        raise ValueError(
            "forward: output_attentions=True is not supported: recurrent layers have no attention "
            "weights, and those of a list are over the slots that are left, not over the tokens "
            "(`statewright trace` shows what is left)"
        )
