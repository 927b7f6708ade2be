"""Signals that end a run: noted when they come, heeded when a step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; what ends a job; what schedulers send a while before its time is over.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Yields what says which of the signals came first, 0 if none did.

    A second Ctrl-C does not wait and is KeyboardInterrupt; the others are repeated by schedulers
    and launchers. Outside of the main thread no signal can be noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signum in came:
            raise KeyboardInterrupt
        came.append(signum)

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
