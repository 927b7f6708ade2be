"""A call's arguments for its cache. `cache` is its name since transformers 5.24; before, it was
`past_key_values` and, in the families of Mamba and xLSTM, `cache_params`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationMixin

NAMES = ("cache", "past_key_values", "cache_params")

# What `generate`, its outputs and most forwards of the installed transformers call it.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def cache_argument(model: nn.Module) -> str | None:
    """What `model.forward` calls the cache; None if it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among the keywords of a call or the fields of an output, under any of its names."""
    found = (value for name, value in given.items() if name in NAMES and value is not None)
    return next(found, None)


def is_recurrent(cache: Any) -> bool:
    """Whether no layer of this cache attends: `generate` then gives its model no mask."""
    if isinstance(cache, (list, tuple)) or hasattr(cache, "rnn_state"):
        return True
    linear = getattr(cache, "is_linear", ())
    return len(linear) > 0 and all(linear)


def by_name(model: nn.Module) -> dict[str, bool]:
    """What a call needs so that its output has names; nothing unless the config asks for tuples."""
    config = getattr(model, "config", None)
    return {} if getattr(config, "return_dict", True) else {"return_dict": True}
