"""Tasks: one per file. Adding one is a file and a line of `catalog.TASKS`."""

from __future__ import annotations

from statewright import spec
from statewright.catalog import TASKS
from statewright.tasks.base import Batch, Sample, Task, digest
from statewright.tasks.chomsky import CHOMSKY
from statewright.tasks.copying import Copying
from statewright.tasks.in_context import InContext
from statewright.tasks.listops import ListOps
from statewright.tasks.mqar import MQAR
from statewright.tasks.newline import Newline
from statewright.tasks.niah import NIAH
from statewright.tasks.passkey import Passkey, by_depth, recall_length
from statewright.tasks.perplexity import Perplexity
from statewright.tasks.qasper import QASPER
from statewright.tasks.selective_copy import SelectiveCopy
from statewright.tasks.squality import SQuALITY
from statewright.tasks.stories import Stories
from statewright.tasks.stream import Stream


def build_task(text: str) -> Task:
    """`build_task("passkey:length=64k")`; ValueError names what is unknown.

    >>> build_task("passkey:length=4k").length
    4096
    """
    return spec.build(text, TASKS, "task")


__all__ = [
    "CHOMSKY",
    "MQAR",
    "NIAH",
    "QASPER",
    "TASKS",
    "Batch",
    "Copying",
    "InContext",
    "ListOps",
    "Newline",
    "Passkey",
    "Perplexity",
    "SQuALITY",
    "Sample",
    "SelectiveCopy",
    "Stories",
    "Stream",
    "Task",
    "build_task",
    "by_depth",
    "digest",
    "recall_length",
]
