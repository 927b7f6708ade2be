"""`statewright eval`: models x tasks x policies, the unbounded model always beside."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from statewright.cli.common import COUNT, MODEL


@click.command("eval")
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    help="Task spec, e.g. passkey:length=4k; repeatable.",
)
@click.option(
    "--policy",
    multiple=True,
    help="Policy spec, e.g. tova:budget=512, or context:length=512, the whole model on contexts "
    "that short; repeatable.",
)
@click.option("-n", "--num-samples", type=COUNT, default=20, show_default=True)
@click.option(
    "--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="Repeatable."
)
@click.option("--prefill", default="exact", show_default=True, help="exact, chunk:c or dense.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Results file (JSON). What it holds already is not run again, so a run that was killed "
    "goes on where it was.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def eval_(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    policy: tuple[str, ...],
    num_samples: int,
    seeds: tuple[int, ...],
    prefill: str,
    output: str | None,
    as_json: bool,
) -> None:
    """Run tasks on models, ours or any transformers causal LM, without and with policies.

    MODEL is a directory, an id or smollm2-135m. Each policy is compared with none, sample by
    sample: the mean difference and its standard error. --output keeps curves, seeds, versions,
    hardware, bytes of state, peak memory and tokens per second too.
    """
    from statewright.checks.load import load_any
    from statewright.cli.common import quiet_libraries
    from statewright.evaluate import Plan, run_plan
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    plan = Plan(models, tasks, policy, seeds, num_samples, prefill)
    command = " ".join(sys.argv[1:])
    results = []
    for _, result in run_plan(plan, lambda m: (load_any(m), saved_tokenizer(m)), output, command):
        _warn(result)
        results.append(result)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["task"], result["seed"]), []).append(result)
    for group in groups.values():
        _table(group, named=len(models) > 1)


def _warn(result: dict[str, Any]) -> None:
    """What a length cut is said once per task, with its baseline."""
    if result["policy"] == "none" and (cut := result["truncated"]):
        click.echo(
            f"{result['task']}: {cut['samples']} of {result['n']} inputs were cut to the length, "
            f"{cut['tokens']:,} tokens in all",
            err=True,
        )


def _table(results: list[dict[str, Any]], named: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from statewright.cli.common import human_bytes

    first = results[0]
    title = f"{first['task']}, {first['n']} samples, seed {first['seed']}"
    title = f"{first['model']}: {title}" if named else title
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("policy", overflow="fold")
    compared = next(iter(first["metrics"]))
    alone = len(results) == 1
    for name in first["metrics"]:
        table.add_column(name.replace("_per_", "/"), justify="right")
    last = "± error" if alone else f"{compared}: more than none"
    table.add_column(last, justify="right", min_width=None if alone else 16)
    table.add_column("state", justify="right", min_width=9)
    for result in results:
        values = [_number(value) for value in result["metrics"].values()]
        more = _error(first["standard_error"]) if alone else ""
        if result is not first:
            more = _difference(result["against_none"])
        size = human_bytes(result["cost"]["state_bytes"])
        table.add_row(result["policy"], *values, more, size)
    Console().print(table)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not finite"
    return f"{found['difference']:+.4f}{_error(found['standard_error'])}"


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
