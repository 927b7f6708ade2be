"""Tasks: one per file. Adding one is a file and a line of `TASKS`."""

from __future__ import annotations

from statewright import spec
from statewright.tasks.base import Batch, Sample, Task
from statewright.tasks.passkey import Passkey, by_depth, recall_length
from statewright.tasks.perplexity import Perplexity

TASKS: dict[str, type] = {"passkey": Passkey, "perplexity": Perplexity}


def build_task(text: str) -> Task:
    """`build_task("passkey:length=64k")`; ValueError names what is unknown."""
    return spec.build(text, TASKS, "task")


__all__ = [
    "TASKS",
    "Batch",
    "Passkey",
    "Perplexity",
    "Sample",
    "Task",
    "build_task",
    "by_depth",
    "recall_length",
]
