"""Cells side by side: in processes of this machine, or on Ray, here or over a cluster.

Nothing but settings travels: a worker makes the cells again by a recipe, and runs the one of a
key. Results come back to the one process that writes the file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import connection
from typing import Any

from statewright.cells import Cell, Done, Runner, in_turn

# Makes the cells of a sweep; it is pickled, so it is a function of a module with its arguments.
Recipe = Callable[[], Sequence[Cell]]
_TRIES = 2


class CellsFailed(ValueError):
    """Some cells have no result, and why; all others have theirs."""

    def __init__(self, why: dict[str, str]) -> None:
        told = "; ".join(f"{key}: {reason}" for key, reason in why.items())
        super().__init__(f"no result of {len(why)} cell(s): {told}")
        self.why = why


def quiet(event: dict[str, Any]) -> None:
    """A listener for workers, which have nobody to tell."""


def runner_of(parallel: str, recipe: Recipe, on_gpu: bool = False) -> Runner:
    """`1`: in this process; `4`: in so many; `ray`, `ray://host:port`: on Ray.

    `ray` is the cluster that RAY_ADDRESS names, or one started on this machine; a GPU per cell if
    `on_gpu`. The recipe is what makes the cells that `run_cells` is given; snapshots of a cell lie
    on the machine that runs it. Raises ValueError for anything else, and if ray is not installed.
    """
    if parallel == "ray" or parallel.startswith("ray://"):
        _import_ray()
        return partial(_on_ray, recipe, None if parallel == "ray" else parallel, on_gpu)
    if not parallel.isdecimal() or int(parallel) < 1:
        raise ValueError(
            f"parallel={parallel!r}, expected a number of processes, ray, or ray://host:port"
        )
    return in_turn if parallel == "1" else partial(_on_processes, recipe, int(parallel))


def _one(recipe: Recipe, key: str) -> Done:
    cell = next((cell for cell in recipe() if cell.key == key), None)
    if cell is None:
        raise ValueError("the recipe makes no such cell")
    return next(in_turn([cell]))


def _said(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"


class _Worker:
    """A process that runs cells, one at a time, and the key of its cell."""

    def __init__(self, recipe: Recipe, threads: int) -> None:
        # Spawned: a forked process may wait for ever for its parent's threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, recipe, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.key: str | None = None

    def begin(self, key: str) -> None:
        self.key = key
        # A process that is already dead says so when its answer is read.
        with contextlib.suppress(OSError):
            self.pipe.send(key)

    def answer(self) -> Done | str | None:
        """What came of its cell: a result, the error that it raised, or None if it died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Any, recipe: Recipe, threads: int) -> None:
    # Ctrl-C reaches the whole group; the driver ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before the recipe imports torch, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    while True:
        try:
            key = pipe.recv()
        except EOFError:
            return
        try:
            answer: Done | str = _one(recipe, key)
        except Exception as error:
            answer = _said(error)
        # The driver may be gone: then the next question does not come either.
        with contextlib.suppress(OSError):
            pipe.send(answer)


def _on_processes(recipe: Recipe, count: int, cells: Iterable[Cell]) -> Iterator[Done]:
    """A dead worker's cell is tried once more in a new one."""
    waiting = deque(cell.key for cell in cells)
    tries: Counter[str] = Counter()
    threads, failed = max(1, (os.cpu_count() or 1) // count), {}
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.key for worker in workers):
            while waiting and len(workers) < count:
                workers.append(_Worker(recipe, threads))
            for worker in workers:
                if waiting and worker.key is None:
                    worker.begin(waiting.popleft())
            for worker in _ready(workers):
                key, answer, worker.key = worker.key, worker.answer(), None
                if isinstance(answer, Done):
                    yield answer
                elif answer is not None:
                    failed[key] = answer
                else:
                    workers.remove(worker)
                    tries[key] += 1
                    if tries[key] < _TRIES:
                        waiting.appendleft(key)
                    else:
                        failed[key] = f"its process died twice ({_ended(worker.process)})"
    finally:
        for worker in workers:
            worker.stop()
    if failed:
        raise CellsFailed(failed)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    busy = {worker.pipe: worker for worker in workers if worker.key is not None}
    return [busy[pipe] for pipe in connection.wait(list(busy))]


def _ended(process: Any) -> str:
    code = process.exitcode
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "parallel=ray needs the ray package: pip install 'statewright[sweep]'"
        ) from error
    return ray


def _on_ray(
    recipe: Recipe, address: str | None, on_gpu: bool, cells: Iterable[Cell]
) -> Iterator[Done]:
    """One task per cell; Ray itself tries a dead worker's task once more."""
    keys = [cell.key for cell in cells]
    if not keys:
        return
    ray, failed = _import_ray(), {}
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False)
    try:
        task = ray.remote(_one).options(max_retries=_TRIES - 1, num_gpus=int(on_gpu))
        shared = ray.put(recipe)
        waiting = {task.remote(shared, key): key for key in keys}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(ready)
            try:
                done = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                failed[key] = _said(error.cause or error)
            except ray.exceptions.RayError as error:
                failed[key] = f"its worker died twice ({type(error).__name__})"
            else:
                yield done
    finally:
        if ours:
            ray.shutdown()
    if failed:
        raise CellsFailed(failed)
