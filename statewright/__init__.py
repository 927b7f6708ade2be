"""Statewright: build, train, bound, check, repair, resize, save and measure the state of any
causal sequence model. Names are loaded on first use, so `import statewright` costs nothing."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "State": "state",
    "VectorState": "state",
    "MatrixState": "state",
    "KVState": "state",
    "ModelState": "state",
    "cat": "state",
    "save_state": "state_file",
    "load_state": "state_file",
    "vector_scan": "ops",
    "MIXERS": "mixers",
    "build_mixer": "mixers",
    "MinGRU": "mixers",
    "MinLSTM": "mixers",
    "StatewrightConfig": "models",
    "StatewrightForCausalLM": "models",
    "StatewrightModel": "models",
    "load": "models",
    "resize": "models.resize",
    "Session": "session",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"statewright.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'statewright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
