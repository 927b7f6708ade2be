"""What a family of checkpoints says about itself, and the helpers its file uses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from statewright.models.config import StatewrightConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One model type: its config and weights to ours and back.

    `target` is the library whose format `config_out` writes ("hf" or "fla").
    """

    model_type: str
    target: str
    mixer: str
    config_in: Callable[[Mapping[str, Any]], StatewrightConfig]
    config_out: Callable[[StatewrightConfig, Mapping[str, Any]], dict[str, Any]]
    weights_in: Callable[[Tensors], Tensors]
    weights_out: Callable[[Tensors], Tensors]


class Renaming:
    """Name patterns, theirs and ours, read in both directions; `{}` is the layer's number."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._pairs = [(_pattern(a), b, _pattern(b), a) for a, b in pairs]

    def ours(self, name: str) -> str:
        """Our name; names that no pattern knows stay, and are then reported as unexpected."""
        return next((r for p, b, _, _ in self._pairs if (r := _apply(p, b, name))), name)

    def theirs(self, name: str) -> str:
        return next((r for _, _, p, a in self._pairs if (r := _apply(p, a, name))), name)


def expect(config: Mapping[str, Any], family: str, **wanted: Any) -> None:
    """Raise ValueError if the config sets one of these to what we do not build."""
    for key, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise ValueError(f"{family}: {key}={config[key]!r} is not supported, expected {shown}")


def needed(config: Mapping[str, Any], family: str, *keys: str) -> list[Any]:
    """The values of keys that must be there."""
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"{family}: the config lacks {', '.join(missing)}")
    return [config[key] for key in keys]


def number_in(value: Any) -> float:
    """A float as transformers writes it: JSON has no infinity, so `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def number_out(value: float) -> Any:
    return value if math.isfinite(value) else {"__float__": "Infinity"}


def whole(value: float, name: str) -> int:
    """An option whose counterpart is an integer there."""
    if value != int(value):
        raise ValueError(f"convert: {name}={value} is not an integer, which that format wants")
    return int(value)


def shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries that every config has and that mean the same."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return {name: config[name] for name in names if name in config}


def common_out(config: StatewrightConfig) -> dict[str, Any]:
    """What any of their configs says about the decoder around the mixers."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        **shared(config.to_dict()),
    }


def _pattern(text: str) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))


def _apply(pattern: re.Pattern, template: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    return template.format(*match.groups()) if match else None
