"""Peak memory while a model reads, measured from outside."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from statewright.checks.report import is_out_of_memory
from statewright.checks.runner import runner_of
from statewright.session import Session

_CHUNK = 1024
_EVERY = 0.005  # seconds between looks at the process's memory


def reading_peak(model: Any, context: int, batch: int, chunk: int = _CHUNK) -> dict[str, int]:
    """Read `context` random tokens in `batch` rows; bytes held at the end, and the peak on the way.

    The peak is of the device's allocator, or of the process on a CPU, above what was held before.
    Raises ValueError, with the length that fits, if memory runs out.
    """
    ids = runner_of(model).random_ids(batch, context)
    session = Session(model, batch_size=batch, chunk=chunk, snapshot_bytes=0)
    with _Watch(ids.device) as watch:
        try:
            for begin in range(0, context, chunk):
                session.feed(ids[:, begin : begin + chunk])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"size: out of memory after {session.seen:,} of {context:,} tokens; "
                f"--context {session.seen} fits"
            ) from error
    return {"state_bytes": session.nbytes, "peak_bytes": watch.peak, "chunk": chunk}


class _Watch:
    """`peak`: the most bytes held within the block, above those at its beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> _Watch:
        self._before = self._held()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            self.peak = max(self.peak, self._held() - self._before)

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        statm = Path("/proc/self/statm")
        if not statm.exists():
            warnings.warn("peak memory is measured on Linux and CUDA only", stacklevel=4)
            return 0
        return int(statm.read_text().split()[1]) * 4096
