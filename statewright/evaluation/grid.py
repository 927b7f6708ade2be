"""Models x tasks x policies, each result a cell of one file; what is there is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from statewright.cells import Cell, read_cells, run_cells
from statewright.evaluation.context import bound_spec, build_bound
from statewright.evaluation.judged import Judge
from statewright.evaluation.measure import environment
from statewright.evaluation.run import check_positions, evaluate_batch, spec_of
from statewright.intervals import SHARES, paired
from statewright.state_file import fingerprint
from statewright.tasks import Batch, Task, build_task, digest

FORMAT = "statewright-eval-1"
Loader = Callable[[str], tuple[Any, Any]]


@dataclass(frozen=True)
class Plan:
    """What to run: `num_samples` of every task for every seed, on every model, under every policy.

    "none", the model as it is, always comes first. judge: a model that compares every policy's
    stories with those of "none". sizes: bytes of state instead of budgets, for `run_bytes`; the
    policies then have none. Raises ValueError for an unknown task or policy, for an empty plan,
    and for a judge without a task that is judged.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    policies: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 20
    prefill: str = "exact"
    judge: str = ""
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: none given, expected at least one")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}, expected at least 1 sample")
        tasks = [build_task(name) for name in self.tasks]
        if self.judge and not any(is_judged(task) for task in tasks):
            raise ValueError("judge: no task is judged, expected stories among the tasks")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"bytes={min(self.sizes)}, expected at least 1 byte")
        for name in () if self.sizes else self.policies:
            build_bound(name)

    @property
    def bounds(self) -> tuple[str, ...]:
        """The policies as they are written in results, each once, "none" first."""
        return tuple(dict.fromkeys(["none", *(bound_spec(build_bound(p)) for p in self.policies)]))


def is_judged(task: Task) -> bool:
    return getattr(task, "judged", False)


def run_plan(
    plan: Plan, load: Loader, path: str | Path | None = None, command: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, result) of every cell, in order: of the file at `path`, or run now and added to it.

    `load(model)` gives a model and its tokenizer. A key names model, task, policy, seed, prefill
    and a digest of weights and data: a file that changed under the same name is run anew. Each
    result is a `Result` with its model and the key of its environment in `about.runs`;
    `against_none`, the paired difference to the unbounded model, is added here. Raises
    ValueError for what a model, a task or a policy refuses; cells before it are kept.
    """
    if path is not None:
        read_cells(path)
    judge = Judge(plan.judge, *load(plan.judge)) if plan.judge else None
    for name in dict.fromkeys(plan.models):
        same = judge is not None and judge.name == name
        model, tokenizer = (judge.model, judge.tokenizer) if judge and same else load(name)
        candidate = Candidate(name, model, tokenizer, plan.bounds)
        yield from run_bounds(plan, candidate, path, command, judge)


@dataclass(frozen=True)
class Candidate:
    """A model by its name in results, and the policies that it is run under, "none" first."""

    name: str
    model: Any
    tokenizer: Any
    bounds: tuple[str, ...]


def run_bounds(
    plan: Plan,
    candidate: Candidate,
    path: str | Path | None,
    command: str,
    judge: Judge | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`run_plan` for one model."""
    model = candidate.model
    weights = fingerprint(model)
    run = {**environment(model.device), "command": command}
    run_key = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
    runner = _Runner(plan, candidate, run_key)
    for task, batch, seed in _drawn(plan, candidate.tokenizer):
        check_positions(model, batch)
        about = {"runs": {run_key: run}}
        found = list(_finished(runner.cells(task, batch, seed, weights), path, about))
        # The first is the unbounded model, and its own baseline.
        first = found[0][1]
        yield from ((key, {**one, "against_none": _against(one, first)}) for key, one in found)
        if judge is not None and is_judged(task):
            results = [one for _, one in found]
            verdicts = judge.cells(task, batch, results, candidate.tokenizer)
            for key, one in _finished(verdicts, path, about):
                even = {"per_sample": [0.5] * one["n"]}
                yield key, {**one, "against_none": _against(one, even)}


def _drawn(plan: Plan, tokenizer: Any) -> Iterator[tuple[Task, Batch, int]]:
    for text in dict.fromkeys(plan.tasks):
        task = build_task(text)
        for seed in dict.fromkeys(plan.seeds):
            yield task, task.draw(plan.num_samples, seed, tokenizer), seed


def _finished(
    cells: list[Cell], path: str | Path | None, about: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every cell's result, each in the file before the next begins."""
    if path is None:
        yield from ((cell.key, cell.run()) for cell in cells)
        return
    runs = {**read_cells(path)["about"].get("runs", {}), **about["runs"]}
    for _ in run_cells(cells, path, {"format": FORMAT, "runs": runs}):
        pass
    found = read_cells(path)["cells"]
    yield from ((cell.key, found[cell.key]) for cell in cells)


@dataclass(frozen=True)
class _Runner:
    plan: Plan
    candidate: Candidate
    run_key: str

    def cells(self, task: Task, batch: Batch, seed: int, weights: str) -> list[Cell]:
        """One per policy."""
        data = hashlib.sha256((weights + digest(batch)).encode()).hexdigest()[:12]
        head = f"{self.candidate.name} | {spec_of(task)} v{task.version}"
        tail = f"n {len(batch.samples)}, seed {seed}, prefill {self.plan.prefill} | {data}"
        return [
            Cell(f"{head} | {bound} | {tail}", partial(self.run, task, batch, bound, seed))
            for bound in self.candidate.bounds
        ]

    def run(self, task: Task, batch: Batch, bound: str, seed: int) -> dict[str, Any]:
        prefill, own = self.plan.prefill, self.candidate
        found = evaluate_batch(own.model, own.tokenizer, task, batch, bound, seed, prefill, 0)
        entry = {"model": own.name, "run": self.run_key, "prefill": prefill}
        return {**entry, **_plain(dataclasses.asdict(found))}


def _against(result: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any] | None:
    """The paired difference on the same samples, of the first metric; None if one is not finite."""
    pair = [result["per_sample"], baseline["per_sample"]]
    if None in [*pair[0], *pair[1]]:
        return None
    return dataclasses.asdict(paired(*pair, next(iter(result["metrics"])) in SHARES))


def _plain(value: Any) -> Any:
    """What JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
