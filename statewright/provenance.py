"""Where a result comes from: versions of packages and the name of the hardware."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

from statewright import __version__


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, None for one that is not there; ours as it runs."""
    found: dict[str, str | None] = {}
    for name in names:
        if name == "statewright":
            # The metadata of an editable installation are as old as the installation.
            found[name] = __version__
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware(device_type: str = "cpu") -> str:
    """The name of the GPU or of the processor, as the machine gives it."""
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
