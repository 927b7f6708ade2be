"""Packages of the extra [rl], imported when they are needed, and what to do where they are not."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(package: str) -> ModuleType:
    """Import a package; ValueError, naming the extra, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{package} cannot be imported ({error}); it comes with the extra [rl]: "
            "pip install 'statewright[rl]'"
        ) from error
