"""`statewright eval`: a task, under policies, the unbounded model always beside."""

from __future__ import annotations

import dataclasses
import json

import click

from statewright.cli.common import COUNT, MODEL


@click.command("eval")
@click.argument("model", type=MODEL)
@click.option("--task", required=True, help="Task spec, e.g. passkey:length=4k.")
@click.option(
    "--policy",
    multiple=True,
    help="Policy spec, e.g. tova:budget=512, or context:length=512, the whole model on contexts "
    "that short; repeatable.",
)
@click.option("-n", "--num-samples", type=COUNT, default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--prefill", default="exact", show_default=True, help="exact, chunk:c or dense.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def eval_(
    model: str,
    task: str,
    policy: tuple[str, ...],
    num_samples: int,
    seed: int,
    prefill: str,
    as_json: bool,
) -> None:
    """Run a task on MODEL, ours or any transformers causal LM, without and with policies.

    MODEL is a directory, an id or smollm2-135m. Each policy is compared with none, sample by
    sample: the mean difference and its standard error.
    """
    from statewright.checks.load import load_any
    from statewright.cli.common import quiet_libraries
    from statewright.evaluate import build_bound, evaluate
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.tasks import build_task

    quiet_libraries()
    chosen = build_task(task)
    names = ["none", *(name for name in policy if name != "none")]
    for name in names:
        build_bound(name)  # a mistyped one is refused before the first run
    net, tokenizer = load_any(model), saved_tokenizer(model)
    results = [evaluate(net, tokenizer, chosen, name, num_samples, seed, prefill) for name in names]
    if as_json:
        click.echo(json.dumps([_as_dict(result, results[0]) for result in results], indent=2))
        return
    _table(results)


def _as_dict(result, reference) -> dict:
    from statewright.evaluate import paired

    against = dataclasses.asdict(paired(result.per_sample, reference.per_sample))
    return {**dataclasses.asdict(result), "against_none": against}


def _table(results) -> None:
    from rich.console import Console
    from rich.table import Table

    from statewright.evaluate import paired

    first = results[0]
    table = Table(title=f"{first.task}, {first.n} samples, seed {first.seed}", title_justify="left")
    table.add_column("policy")
    for name in first.metrics:
        table.add_column(name, justify="right")
    compared = next(iter(first.metrics))
    table.add_column(f"{compared}: more than none", justify="right")
    for result in results:
        found = paired(result.per_sample, first.per_sample)
        error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
        more = "" if result is first else f"{found.difference:+.4f}{error}"
        values = (f"{value:.4f}" for value in result.metrics.values())
        table.add_row(result.policy, *values, more)
    Console().print(table)
