"""A run's events as TensorBoard scalars, where the `tensorboard` package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoardListener:
    """Writes every number of an event under `<event>/<name>` at its step; close it at the end.

    Raises ValueError, naming the extra, if tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs: pip install 'statewright[track]'") from error
        self.writer = SummaryWriter(directory / "tensorboard")

    def __call__(self, event: dict[str, Any]) -> None:
        for name, value in event.items():
            if name not in ("event", "step"):
                self.writer.add_scalar(f"{event['event']}/{name}", value, event["step"])

    def close(self) -> None:
        self.writer.close()
