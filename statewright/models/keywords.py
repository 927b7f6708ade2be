"""Keywords of a forward: what is known passes, what asks for anything else is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

LOSS_KEYWORDS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})

# Values with which a caller asks for what a forward does anyway.
_AS_ALWAYS = {"return_dict": True}


def split_keywords(
    caller: str, given: Mapping[str, Any], *groups: Collection[str]
) -> tuple[dict[str, Any], ...]:
    """One dict per group of names: the entries of `given` that the group knows.

    A keyword of no group is ignored if its value is None or False: a newer transformers sends
    keywords that we do not know, at their defaults. Raises ValueError naming any other.
    """
    known = frozenset().union(*groups)
    unknown = [name for name, value in given.items() if name not in known and _asks(name, value)]
    if unknown:
        raise ValueError(
            f"{caller}: unknown keyword {', '.join(sorted(unknown))}; beside its named arguments "
            f"it takes {', '.join(sorted(known))}"
        )
    return tuple({name: given[name] for name in group if name in given} for group in groups)


def _asks(name: str, value: Any) -> bool:
    return not (value is None or value is False or value is _AS_ALWAYS.get(name))
