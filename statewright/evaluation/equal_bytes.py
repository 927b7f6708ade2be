"""Everybody at the same bytes of state: scores against measured bytes, gaps marked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statewright.cells import read_cells, write_json
from statewright.evaluation.answers import call_options
from statewright.evaluation.context import ShortContext, bound_spec, build_bound
from statewright.evaluation.curves import Curve
from statewright.evaluation.grid import Candidate, Loader, Plan, run_bounds
from statewright.evaluation.measure import a_few_ids, footprint
from statewright.intervals import SHARES, estimate
from statewright.models import StatewrightForCausalLM
from statewright.models.resize import plan_resize, resize
from statewright.policies import Eviction

# A state counts as being at a size if its measured bytes are that close to it.
TOLERANCE = 0.1
POLICIES = ("window", "window:sinks=4", "h2o", "tova")
_GROWN = " +key="


@dataclass(frozen=True)
class Missing:
    """A point that cannot be had: of whom, the bytes meant, the nearest if known, and why."""

    model: str
    policy: str
    target: int
    nearest: int | None
    reason: str


def run_bytes(
    plan: Plan, load: Loader, path: str | Path | None = None, command: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `run_plan`, at `plan.sizes` bytes of state instead of budgets in tokens.

    Models that keep lists: as they are, and under every policy (`POLICIES` if none are given) with
    each size as its budget, less what the model keeps beside. Models of one size stand where they
    are; ours are also grown to larger sizes by `resize`, which preserves the function. Results get
    `target`, the size meant (None: as it is). A point that cannot be had comes as a `Missing`, its
    reason under `unreachable`. At the end the file gets `recall_against_bytes`: curves and those
    points. Raises ValueError as `run_plan`, and for policies with a budget of their own.
    """
    policies = tuple(_checked(policy) for policy in plan.policies) or POLICIES
    results, missing = [], []
    for name in dict.fromkeys(plan.models):
        model, tokenizer = load(name)
        own = Candidate(name, model, tokenizer, ("none",))
        for found in _candidates(own, sorted(set(plan.sizes)), policies):
            if isinstance(found, Missing):
                missing.append(found)
                key = f"{found.model} | {found.policy} | {found.target} B"
                yield key, {**dataclasses.asdict(found), "unreachable": found.reason}
                continue
            candidate, targets = found
            for key, result in run_bounds(plan, candidate, path, command):
                results.append(result)
                yield key, {**result, "target": targets.get(result["policy"])}
    if path is not None:
        kept = read_cells(path)
        kept["recall_against_bytes"] = {
            "sizes": sorted(set(plan.sizes)),
            "curves": [dataclasses.asdict(curve) for curve in byte_curves(results)],
            "unreachable": [dataclasses.asdict(one) for one in missing],
        }
        if kept != read_cells(path):
            write_json(path, kept)


def _checked(policy: str) -> str:
    """A policy that only lacks its budget."""
    if "budget=" in policy:
        raise ValueError(f"policy {policy!r}: bytes take the place of its budget, leave it out")
    chosen = build_bound(policy if policy.startswith("context") else f"{policy}:budget=1GiB")
    if isinstance(chosen, ShortContext) or not isinstance(chosen, Eviction):
        raise ValueError(f"policy {policy!r} bounds no list of keys and values, so it has no bytes")
    return policy


Found = tuple[Candidate, Mapping[str, int | None]] | Missing


def _candidates(own: Candidate, sizes: list[int], policies: tuple[str, ...]) -> Iterator[Found]:
    """A model's points at the sizes, each with the size that a policy stands for."""
    has = footprint(own.model)
    if not has.per_token:
        yield own, {"none": _nearest(has.fixed, sizes)}
        yield from _grown(own, has.fixed, sizes)
        return
    bounds, missing = {}, []
    for policy in policies:
        for size in sizes:
            bound = bound_spec(build_bound(f"{policy}:budget={max(size - has.fixed, 1)}B"))
            reason = "the model keeps more beside its list" if size <= has.fixed else ""
            reason = reason or _refused(own.model, bound)
            if reason:
                missing.append(Missing(own.name, policy, size, None, reason))
            else:
                bounds[bound] = size
    yield dataclasses.replace(own, bounds=("none", *bounds)), bounds
    yield from missing


def _nearest(size: int, sizes: list[int]) -> int | None:
    """The size that this one counts as; None if it is close to none."""
    nearest = min(sizes, key=lambda target: abs(target - size))
    return nearest if abs(nearest - size) <= TOLERANCE * nearest else None


def _grown(own: Candidate, size: int, sizes: list[int]) -> Iterator[Found]:
    """The model resized to each size that it is not at; what cannot be had, with its reason."""
    for target in sizes:
        if _nearest(size, [target]):
            continue
        found, nearest = _factor(own.model, size, target)
        if isinstance(found, str):
            yield Missing(own.name, "none", target, nearest, found)
            continue
        name = f"{own.name}{_GROWN}{found}x"
        model = resize(own.model, key=found, layers="all", init="zero")
        yield dataclasses.replace(own, name=name, model=model), {"none": target}


def _factor(model: Any, size: int, target: int) -> tuple[int | str, int]:
    """By how much to grow a model's keys, or why not; and the nearest bytes."""
    if target < size:
        return "its state is larger, and shrinking loses (statewright resize --key 0.5x)", size
    if not isinstance(model, StatewrightForCausalLM):
        return "its state has one size", size
    try:
        sizes = [plan_resize(model.config, key=k, layers="all").state_bytes for k in (2, 3)]
    except ValueError as error:
        return str(error), size
    (before, twice), (_, thrice) = sizes
    factor = max(1, 2 + round((target - twice) / (thrice - twice)))
    nearest = before if factor == 1 else twice + (factor - 2) * (thrice - twice)
    if factor == 1 or abs(nearest - target) > TOLERANCE * target:
        return f"no whole factor comes nearer than {nearest:,} bytes", nearest
    return factor, nearest


@torch.no_grad()
def _refused(model: Any, bound: str) -> str:
    """Why a model cannot be under this policy; empty if it can."""
    try:
        model(a_few_ids(model, 2), **call_options(model, bound, "exact"))
    except ValueError as error:
        return str(error)
    return ""


def byte_curves(results: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Score against measured bytes of state, a curve per task and candidate.

    y: the mean over seeds of the first metric; its interval is over seeds, or over the samples of
    the only one. Points that are not finite are left out.
    """
    gathered: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for result in results:
        points = gathered.setdefault(_named(result), {})
        points.setdefault(f"{result['model']} {result['policy']}", []).append(result)
    return [_curve(name, list(points.values())) for name, points in gathered.items()]


def candidate_of(model: str, policy: str) -> str:
    """A candidate's name, whatever its size: the model, whether it was grown, the policy."""
    base, grown, _ = model.partition(_GROWN)
    parts = [part for part in policy.split(":") if not part.startswith("budget=")]
    return " ".join([base, *(["grown"] if grown else []), ":".join(parts)])


def _named(result: Mapping[str, Any]) -> str:
    return f"{result['task']} | {candidate_of(result['model'], result['policy'])}"


def _curve(name: str, points: list[list[Mapping[str, Any]]]) -> Curve:
    found = []
    unit = next(iter(points[0][0]["metrics"]))
    for seeds in points:
        values = [next(iter(one["metrics"].values())) for one in seeds]
        if None in values:
            continue
        size = math.fsum(one["cost"]["state_bytes"] for one in seeds) / len(seeds)
        over = estimate(values, unit in SHARES)
        span = over.interval if len(values) > 1 else seeds[0].get("interval")
        found.append((size, over.mean, span))
    x, y, spans = zip(*sorted(found, key=lambda point: point[0])) if found else ((), (), ())
    return Curve(name, x, y, "bytes of state", unit, spans)
