"""`statewright eval`: a task, under policies, the unbounded model always beside."""

from __future__ import annotations

import dataclasses
import json

import click

from statewright.cli.common import COUNT


@click.command("eval")
@click.argument("model", type=click.Path())
@click.option("--task", required=True, help="Task spec, e.g. passkey:length=4k.")
@click.option("--policy", multiple=True, help="Policy spec, e.g. tova:budget=512; repeatable.")
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
    """Run a task on MODEL, ours or any transformers causal LM, without and with policies."""
    from statewright.cli.common import quiet_libraries
    from statewright.evaluate import evaluate
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.policies import build_policy
    from statewright.tasks import build_task

    quiet_libraries()
    chosen = build_task(task)
    names = ["none", *(name for name in policy if name != "none")]
    for name in names:
        build_policy(name)  # a mistyped one is refused before the first run
    net, tokenizer = _load(model), saved_tokenizer(model)
    results = [evaluate(net, tokenizer, chosen, name, num_samples, seed, prefill) for name in names]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
        return
    _table(results)


def _load(model: str):
    import json as reader
    from pathlib import Path

    from statewright.hf.loading import load_causal_lm
    from statewright.models import load
    from statewright.models.load import OURS

    config = Path(model) / "config.json"
    ours = config.is_file() and reader.loads(config.read_text()).get("model_type") == OURS
    return load(model) if ours else load_causal_lm(model)


def _table(results) -> None:
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    table = Table(title=f"{first.task}, {first.n} samples, seed {first.seed}", title_justify="left")
    table.add_column("policy")
    for name in first.metrics:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(result.policy, *(f"{value:.4f}" for value in result.metrics.values()))
    Console().print(table)
