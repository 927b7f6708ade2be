"""`statewright eval`: models x tasks x policies, the unbounded model always beside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from statewright.cli.common import human_bytes
from statewright.cli.show import Column, console, counted, emit, json_option, table
from statewright.cli.types import BOUND, MODEL, POSITIVE, SEED, SIZES, TASK
from statewright.names import short_names

_MOST_COLUMNS = 5


@click.command("eval")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option(
    "--task",
    "tasks",
    type=TASK,
    multiple=True,
    required=True,
    help="Task spec, e.g. passkey:length=4k; repeatable.",
)
@click.option(
    "--policy",
    type=BOUND,
    multiple=True,
    help="Policy spec, e.g. tova:budget=512, or context:length=512, the whole model on contexts "
    "that short; repeatable.",
)
@click.option("-n", "--num-samples", type=POSITIVE, default=20, show_default=True)
@click.option(
    "--seed", "seeds", type=SEED, multiple=True, default=(0,), show_default=True, help="Repeatable."
)
@click.option("--prefill", default="exact", show_default=True, help="exact, chunk:c or dense.")
@click.option(
    "--bytes",
    "sizes",
    type=SIZES,
    default=(),
    metavar="SIZES",
    help="Everybody at so many bytes of state, e.g. 64KiB,256KiB,1MiB; policies without a budget "
    "then [default: window, window:sinks=4, h2o, tova].",
)
@click.option(
    "--judge",
    type=MODEL,
    default="",
    metavar="MODEL",
    help="Compares every policy's stories with those of none, in both orders.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    show_default=True,
    help="Of weights and lists; states of recurrences stay float32.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Results file (JSON). What it holds already is not run again, so a run that was killed "
    "goes on where it was.",
)
@json_option
def eval_(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    policy: tuple[str, ...],
    num_samples: int,
    seeds: tuple[int, ...],
    prefill: str,
    sizes: tuple[int, ...],
    judge: str,
    dtype: str,
    output: str | None,
    as_json: bool,
) -> None:
    """Run tasks on models, ours or any transformers causal LM, without and with policies.

    \b
    Example: statewright eval run --task passkey --policy tova:budget=64

    MODEL is a directory, an id or smollm2-135m. Each policy is compared with none, sample by
    sample: the mean difference and its 95 % interval. --output keeps curves, seeds, versions,
    hardware, bytes of state, peak memory and tokens per second too. With --bytes the axis is the
    measured bytes of state: models of one size stand where they are, ours are also grown, and
    points out of reach are marked.
    """
    import torch

    from statewright.cli.common import quiet_libraries
    from statewright.evaluation import Plan, run_bytes, run_plan
    from statewright.models.any_model import load_any
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    if sizes and judge:
        raise click.UsageError("--judge compares policies by their budgets, not with --bytes")
    plan = Plan(models, tasks, policy, seeds, num_samples, prefill, str(judge), sizes)
    command = " ".join(sys.argv[1:])
    run, results = run_bytes if sizes else run_plan, []

    def load(name: str) -> tuple[Any, Any]:
        return load_any(name, getattr(torch, dtype)), saved_tokenizer(name)

    for _, result in run(plan, load, output, command):
        _warn(result)
        results.append(result)
    if as_json:
        emit(results)
    elif sizes:
        _byte_tables(results)
    else:
        _tables(results, named=len(models) > 1)


def _tables(results: list[dict[str, Any]], named: bool) -> None:
    """One per model, task and seed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["task"], result["seed"]), []).append(result)
    for group in groups.values():
        _table(group, named)


def _warn(result: dict[str, Any]) -> None:
    """What a length cut is said once per task, with its baseline."""
    if result["policy"] == "none" and (cut := result.get("truncated")):
        click.echo(
            f"{result['task']}: {cut['samples']} of {result['n']} inputs were cut to the length, "
            f"{cut['tokens']:,} tokens in all",
            err=True,
        )


def _byte_tables(results: list[dict[str, Any]]) -> None:
    """One per task: candidates by size; a point out of reach is a number, explained below."""
    from statewright.evaluation.equal_bytes import candidate_of

    to = console()
    missing = [r for r in results if "unreachable" in r]
    found = [r for r in results if "unreachable" not in r]
    names = short_names([r["model"] for r in results])
    notes = list(dict.fromkeys(r["unreachable"] for r in missing))
    sizes = sorted({r["target"] for r in results if r["target"] is not None})
    columns = [Column(name, number=True) for name in ("as it is", *map(human_bytes, sizes))]
    for task in dict.fromkeys(r["task"] for r in found):
        own = [r for r in found if r["task"] == task]
        score = next(iter(own[0]["metrics"]))
        places: dict[str, dict[int | None, list[str]]] = {}
        for r in own:
            row = places.setdefault(candidate_of(names[r["model"]], r["policy"]), {})
            value = _number(next(iter(r["metrics"].values())))
            row.setdefault(r["target"], []).append(
                f"{value}\n({human_bytes(r['cost']['state_bytes'])})"
            )
        for r in missing:
            row = places.setdefault(candidate_of(names[r["model"]], r["policy"]), {})
            row[r["target"]] = [f"- [{notes.index(r['unreachable']) + 1}]"]
        rows = [
            (name, *("\n".join(row.get(size, [])) for size in (None, *sizes)))
            for name, row in places.items()
        ]
        table(to, f"{task}: {score} (measured bytes)", ["candidate", *columns], rows)
    for i, note in enumerate(notes, 1):
        to.print(f"[{i}] not reachable: {note}")


def _table(results: list[dict[str, Any]], named: bool) -> None:
    first = results[0]
    title = f"{first['task']}, {counted(first['n'], 'sample')}, seed {first['seed']}"
    title = f"{first['model']}: {title}" if named else title
    if len(first["metrics"]) > _MOST_COLUMNS:
        _by_metric(title, results)
        return
    compared = next(iter(first["metrics"]))
    alone = len(results) == 1
    names = [name.replace("_per_", "/") for name in first["metrics"]]
    names += ["95 % interval" if alone else f"{compared}: more than none", "state"]
    rows = []
    for result in results:
        values = [_number(value) for value in result["metrics"].values()]
        more = _interval(first.get("interval")) if alone else ""
        if result is not first:
            more = _difference(result["against_none"])
        rows.append((result["policy"], *values, more, human_bytes(result["cost"]["state_bytes"])))
    table(console(), title, ["policy", *(Column(name, number=True) for name in names)], rows)


def _by_metric(title: str, results: list[dict[str, Any]]) -> None:
    """A line per metric, a column per policy: for tasks with many."""
    rows = []
    for i, name in enumerate(results[0]["metrics"]):
        values = [_number(r["metrics"].get(name)) for r in results]
        if i == 0:
            spans = [_interval(r.get("interval")) for r in results]
            values = [f"{v}\n{span}".rstrip() for v, span in zip(values, spans)]
        rows.append((name.replace("_per_", "/"), *values))
    rows.append(("state", *(human_bytes(r["cost"]["state_bytes"]) for r in results)))
    columns = ["metric", *(Column(result["policy"], number=True) for result in results)]
    table(console(), title, columns, rows)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not finite"
    span = None if found["low"] is None else (found["low"], found["high"])
    return f"{found['mean']:+.4f}\n{_interval(span, '+')}".rstrip()


def _interval(span: Sequence[float] | None, sign: str = "") -> str:
    return "" if span is None else f"[{span[0]:{sign}.4f}, {span[1]:{sign}.4f}]"
