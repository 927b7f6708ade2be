"""How everything is measured: round-robin in one process, a floor in every run, errors first.

Machines are shared and drift by a factor of two between minutes, so a time means nothing alone.
All methods of a case take turns; a row is the ratio of its best time to the floor's best.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from statewright.provenance import hardware, versions

PACKAGES = ("torch", "transformers", "mingru-pytorch", "mambapy", "numpy")


@dataclass(frozen=True)
class Row:
    """One method in one case: times in seconds, error against float64 where it has one."""

    case: str
    method: str
    threads: int
    best: float
    median: float
    spread: float
    rounds: int
    to_floor: float
    error: float | None = None


@dataclass
class Case:
    """Methods that do the same work; `floor` names the one that sets the physical limit.

    `errors` gives the max-normalised error against float64 of methods that compute a result, and
    `tolerance` the largest that is allowed: a method beyond it fails the gate and is not timed.
    """

    name: str
    floor: str
    methods: dict[str, Callable[[], Any]]
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """The gate: a wrong answer has no speed."""
        for name, limit in self.tolerance.items():
            if not self.errors[name] <= limit:
                raise RuntimeError(
                    f"{self.name}: {name} has error {self.errors[name]:.2g}, allowed {limit:.2g}; "
                    "nothing is measured until it is right"
                )


def measure(case: Case, threads: int, seconds: float = 4.0, most: int = 25) -> list[Row]:
    """Time a case's methods in turns for about `seconds`, at least three rounds each."""
    case.check()
    with using_threads(threads):
        times: dict[str, list[float]] = {name: [] for name in case.methods}
        for method in case.methods.values():
            method()
        began = time.perf_counter()
        for i in range(most):
            if i >= 3 and time.perf_counter() - began > seconds:
                break
            for name, method in case.methods.items():
                gc.collect(0)
                start = time.perf_counter()
                method()
                times[name].append(time.perf_counter() - start)
    floor = min(times[case.floor])
    return [
        Row(
            case.name,
            name,
            threads,
            min(t),
            statistics.median(t),
            max(t) / min(t),
            len(t),
            min(t) / floor,
            case.errors.get(name),
        )
        for name, t in times.items()
    ]


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def environment(command: str) -> dict[str, Any]:
    """What a result must carry to be believed: versions, processor, threads, load, allocator."""
    return {
        "command": command,
        "versions": versions(PACKAGES),
        "python": platform.python_version(),
        "processor": hardware(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "allocator": "THP" if os.environ.get("THP_MEM_ALLOC_ENABLE") else "default",
        "date": time.strftime("%Y-%m-%d"),
    }


def as_json(rows: list[Row], environment: Mapping[str, Any]) -> dict[str, Any]:
    return {"environment": dict(environment), "rows": [asdict(row) for row in rows]}
