"""Tasks: one per file. Adding one is a file and a line of `TASKS`."""

from __future__ import annotations

from statewright import spec
from statewright.tasks.base import Batch, Sample, Task
from statewright.tasks.chomsky import CHOMSKY
from statewright.tasks.in_context import InContext
from statewright.tasks.listops import ListOps
from statewright.tasks.mqar import MQAR
from statewright.tasks.niah import NIAH
from statewright.tasks.passkey import Passkey, by_depth, recall_length
from statewright.tasks.perplexity import Perplexity
from statewright.tasks.selective_copy import SelectiveCopy

TASKS: dict[str, type] = {
    "passkey": Passkey,
    "perplexity": Perplexity,
    "mqar": MQAR,
    "niah": NIAH,
    "in-context": InContext,
    "selective-copy": SelectiveCopy,
    **CHOMSKY,
    "listops": ListOps,
}


def build_task(text: str) -> Task:
    """`build_task("passkey:length=64k")`; ValueError names what is unknown."""
    return spec.build(text, TASKS, "task")


__all__ = [
    "CHOMSKY",
    "MQAR",
    "NIAH",
    "TASKS",
    "Batch",
    "InContext",
    "ListOps",
    "Passkey",
    "Perplexity",
    "Sample",
    "SelectiveCopy",
    "Task",
    "build_task",
    "by_depth",
    "recall_length",
]
