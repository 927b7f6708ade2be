"""`statewright size`: bytes of state by kind and layer, beside a Transformer's cache."""

from __future__ import annotations

import json
from typing import Any

import click

from statewright.cli.common import COUNT, human_bytes


@click.command()
@click.argument("model", type=click.Path())
@click.option("--context", type=COUNT, default=32 * 1024, show_default=True, help="Tokens read.")
@click.option("--batch", type=COUNT, default=1, show_default=True, help="Rows.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def size(model: str, context: int, batch: int, as_json: bool) -> None:
    """Show the state of MODEL after --context tokens, measured from its tensors.

    Beside it stands the key/value cache of a Transformer of the same depth, width and dtype
    (all heads kept), and the length at which that cache outgrows this state.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.models import load

    quiet_libraries()
    report = measure(load(model), context, batch)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _table(report)


def measure(model: Any, context: int, batch: int) -> dict[str, Any]:
    """Bytes by layer and tensor for `batch` rows; recurrent states do not depend on `context`."""
    if context < 1 or batch < 1:
        raise ValueError(f"size: context={context}, batch={batch}, expected at least 1")
    state = model.init_state(batch)
    layers = []
    for layer in state.layers:
        tensors = {name: t.numel() * t.element_size() for name, t in layer.items()}
        layers.append({"kind": type(layer).__name__, "bytes": layer.nbytes, "tensors": tensors})
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return {
        "context": context,
        "batch": batch,
        "state_bytes": state.nbytes,
        "layers": layers,
        "transformer_bytes": per_token * context * batch,
        "crossover_tokens": -(-state.nbytes // (per_token * batch)),
    }


def _table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"State of {report['batch']} row(s)", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("kind")
    table.add_column("tensors")
    table.add_column("bytes", justify="right")
    for i, layer in enumerate(report["layers"]):
        inside = ", ".join(f"{name} {count:,}" for name, count in layer["tensors"].items())
        table.add_row(str(i), layer["kind"], inside, f"{layer['bytes']:,}")
    console = Console()
    console.print(table)
    ratio = report["transformer_bytes"] / report["state_bytes"]
    console.print(
        f"state            {human_bytes(report['state_bytes']):>12}  at any length\n"
        f"Transformer      {human_bytes(report['transformer_bytes']):>12}  "
        f"at {report['context']:,} tokens ({ratio:,.0f}x)\n"
        f"crossover        {report['crossover_tokens']:>12,}  tokens"
    )
