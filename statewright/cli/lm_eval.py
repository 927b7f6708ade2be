"""`statewright lm-eval`: lm-eval's tasks, and ours, on a model under a policy."""

from __future__ import annotations

import json
from typing import Any

import click

from statewright.cli.show import Column, json_option, show, table
from statewright.cli.types import BOUND, COUNT, MODEL, POSITIVE


@click.command("lm-eval")
@click.option("--model", type=MODEL, required=True, help="A directory, an id or smollm2-135m.")
@click.option(
    "--policy", type=BOUND, default="none", show_default=True, help="E.g. tova:budget=512."
)
@click.option(
    "--tasks",
    required=True,
    help="Names, with commas: lm-eval's, or ours: statewright_{passkey,niah,squality,qasper}.",
)
@click.option("--prefill", default="exact", show_default=True, help="exact, chunk:c or dense.")
@click.option("--num-fewshot", type=COUNT, help="Examples in the prompt; the task's own otherwise.")
@click.option("--limit", type=COUNT, help="Samples per task; all otherwise.")
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True)
@click.option("--max-length", type=COUNT, help="Tokens of context that are kept.")
@click.option("--include-path", type=click.Path(exists=True), help="More task YAML files.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    help="key=value for our tasks: length, data, text, num_samples, seed; repeatable.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="Results file (JSON).")
@json_option
def lm_eval(model: str, tasks: str, output: str | None, as_json: bool, **options: Any) -> None:
    """Run lm-eval (extra `lm-eval`) with the policy applied in every call of the model.

    \b
    Example: statewright lm-eval --model run --tasks lambada_openai
    """
    from statewright.cli.common import quiet_libraries
    from statewright.evaluation import environment
    from statewright.evaluation.context import build_bound
    from statewright.evaluation.harness import Harness, run_harness
    from statewright.models.any_model import load_any
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    build_bound(options["policy"])
    settings = dict(_setting(text) for text in options.pop("settings"))
    names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
    harness = Harness(names, options=settings, **options)
    net = load_any(model)
    found = run_harness(net, saved_tokenizer(model), harness, tokenizer_path=model)
    if output is not None:
        about = {"model": model, "policy": harness.policy, **environment(net.device)}
        _write(output, {"about": about, **found})
    show(found["results"], as_json, lambda to, results: _draw(to, harness.policy, results))


def _setting(text: str) -> tuple[str, Any]:
    from statewright.spec import parse_int

    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise click.BadParameter(f"{text!r}, expected key=value", param_hint="--set")
    try:
        return key, parse_int(value)
    except ValueError:
        return key, value


def _write(path: str, found: dict[str, Any]) -> None:
    from statewright.cells import write_json

    write_json(path, json.loads(json.dumps(found, default=str)))


def _draw(console: Any, policy: str, results: dict[str, dict[str, Any]]) -> None:
    rows = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{kind}")
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                rows.append((task, metric, f"{value:.4f}", shown))
    numbers = Column("value", number=True), Column("standard error", number=True)
    table(console, f"lm-eval, policy {policy}", ["task", "metric", *numbers], rows)
