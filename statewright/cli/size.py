"""`statewright size`: bytes of state by kind and layer, beside a Transformer's cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from statewright.cli.common import human_bytes
from statewright.cli.show import Column, counted, json_option, show, table
from statewright.cli.types import BYTES, FAMILY, MODEL, POLICY, POSITIVE, TEXT


@click.command()
@click.argument("model", required=False, type=MODEL)
@click.option("--family", type=FAMILY, help="A tiny model of this family instead of MODEL.")
@click.option("--context", type=POSITIVE, default=32 * 1024, show_default=True, help="Tokens read.")
@click.option("--batch", type=POSITIVE, default=1, show_default=True, help="Rows.")
@click.option(
    "--policy", type=POLICY, multiple=True, help="Bounds, e.g. tova:budget=512; repeatable."
)
@click.option("--memory", type=BYTES, help="With --policy: the largest batch, e.g. in 32GiB.")
@click.option(
    "--measure",
    "measured",
    is_flag=True,
    help="Read that many tokens: peak memory. With --policy: decode, full, and time it.",
)
@click.option("--plan", is_flag=True, help="Length to train on, and to recall from, by its size.")
@click.option("--plan-from", type=TEXT, help="With --plan: a file of `capacity`.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a checkpoint brings.")
@json_option
def size(model: str | None, family: str | None, as_json: bool, **options: Any) -> None:
    """Show the state of MODEL after --context tokens, measured from its tensors.

    \b
    Example: statewright size run --context 64k

    MODEL is ours or any causal LM of transformers; of the latter its config.json is enough.
    Beside it stands the key/value cache of a Transformer of the same depth, width and dtype
    (all heads kept), and the length at which that cache outgrows this state. With --policy: the
    bytes under each full budget beside the unbounded cache's (arXiv:2401.06104, table 1).
    """
    from statewright.cli.common import quiet_libraries

    if (model is None) == (family is None):
        raise click.UsageError("give exactly one of MODEL and --family")
    context, batch = options["context"], options["batch"]
    quiet_libraries()
    if options["plan"] or options["plan_from"]:
        _plan(model, family, options, as_json)
        return
    if options["policy"]:
        report = _bounded(model, family, options)
        show(report, as_json, _bounded_table)
        return
    if options["memory"] is not None:
        raise click.UsageError("--memory needs a --policy")
    if model is not None and _is_ours(model):
        from statewright.models import load

        report = measure(load(model), context, batch)
    else:
        report = measure_foreign(_config(model, family, options), context, batch)
    if options["measured"]:
        report["peak"] = _peak(model, family, options)
    show(report, as_json, _table)


def _plan(model: str | None, family: str | None, options: dict[str, Any], as_json: bool) -> None:
    from statewright.cli.size_plan import numbers_of, show_plan

    if not options["plan"]:
        raise click.UsageError("--plan-from needs --plan")
    ours = model is not None and _is_ours(model)
    config = None if ours else _config(model, family, options)
    show_plan(numbers_of(model if ours else None, config), options["plan_from"], as_json)


def measure(model: Any, context: int, batch: int) -> dict[str, Any]:
    """Bytes by layer and tensor of our model's state for `batch` rows after `context` tokens."""
    from statewright.hf.bridge import kinds_of
    from statewright.hf.sizing import own_layer_sizes
    from statewright.state import KVState

    state = model.init_state(batch)
    grows = any(isinstance(layer, KVState) for layer in state.layers)
    if grows and not model.config.policy:
        sizes = own_layer_sizes(model, batch)
        return _from_sizes(model.config, model.dtype, context, batch, sizes, state.seen.nbytes)
    if grows:  # what a policy keeps is known when it has read
        state = _read(model, context, batch)
    layers = []
    for layer in state.layers:
        tensors = {name: t.numel() * t.element_size() for name, t in layer.items()}
        layers.append({"kind": type(layer).__name__, "bytes": layer.nbytes, "tensors": tensors})
    return _report(
        model.config, model.dtype, context, batch, layers, kinds_of(state), lambda n: state.nbytes
    )


def measure_foreign(config: Any, context: int, batch: int) -> dict[str, Any]:
    """As `measure`, for a transformers config; nothing is loaded."""
    import torch

    from statewright.hf.sizing import layer_sizes

    text, dtype = config.get_text_config(decoder=True), getattr(config, "dtype", None)
    dtype = dtype or torch.float32
    return _from_sizes(text, dtype, context, batch, layer_sizes(config, batch), 0)


def _from_sizes(
    config: Any, dtype: Any, context: int, batch: int, sizes: Any, beside: int
) -> dict[str, Any]:
    layers, kinds = [], {}
    for entry in sizes:
        found = {kind: count for kind, count in entry.at(context).items() if count}
        layers.append({"kind": entry.kind, "bytes": sum(found.values()), "tensors": found})
        for kind, count in found.items():
            kinds[kind] = kinds.get(kind, 0) + count

    def state_bytes(n: int) -> int:
        return beside + sum(sum(entry.at(n).values()) for entry in sizes)

    return _report(config, dtype, context, batch, layers, kinds, state_bytes)


def _read(model: Any, context: int, batch: int) -> Any:
    from statewright.checks.runner import runner_of
    from statewright.session import Session

    session = Session(model, batch_size=batch, snapshot_bytes=0)
    session.feed(runner_of(model).random_ids(batch, context))
    return session.state


def _report(
    config: Any, dtype: Any, context: int, batch: int, layers: Any, kinds: Any, state_bytes: Any
) -> dict[str, Any]:
    from statewright.hf.sizing import crossover

    per_token = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize * batch
    return {
        "context": context,
        "batch": batch,
        "state_bytes": state_bytes(context),
        "kinds": {kind: count for kind, count in kinds.items() if count},
        "grows": state_bytes(context + 1) != state_bytes(context),
        "layers": layers,
        "transformer_bytes": per_token * context,
        "crossover_tokens": crossover(state_bytes, per_token),
    }


def _bounded(model: str | None, family: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Every policy's bytes and largest batch, the unbounded cache first."""
    from statewright.hf.sizing import bounded_sizes

    if model is not None and _is_ours(model):
        raise ValueError("size: --policy is for transformers models; ours name it in their config")
    names, batch, memory = list(options["policy"]), options["batch"], options["memory"]
    config = _config(model, family, options)
    sizes = bounded_sizes(config, names, options["context"])
    net = _net(model, family, options) if options["measured"] else None
    rows = []
    for name in [None, *names]:
        per_row = sizes.full if name is None else sizes.bounded[name]
        row = {"policy": name or "none", "row_bytes": per_row, "bytes": per_row * batch}
        if memory is not None:
            row["largest_batch"] = sizes.largest_batch(memory, name)
        if net is not None:
            row |= _decoded(net, name, options["context"], batch)
        rows.append(row)
    return {
        "context": options["context"],
        "batch": batch,
        "weights_bytes": sizes.weights,
        "memory": memory,
        "rows": rows,
    }


def _decoded(net: Any, policy: str | None, context: int, batch: int) -> dict[str, float]:
    """Tokens per second over all rows, and bytes held, once the budget is full."""
    import torch

    from statewright.evaluation.decoding import decode
    from statewright.policies import build_policy

    budget = getattr(build_policy(policy), "budget", context)
    prompt = min(context, budget) if isinstance(budget, int) else context
    generator = torch.Generator().manual_seed(0)
    vocabulary = net.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(net.device)
    point = list(decode(net, ids, policy, num_tokens=24, every=8))[-1]
    return {
        "measured_bytes": point.cache_bytes,
        "tokens_per_second": batch / point.seconds_per_token,
    }


def _bounded_table(console: Any, report: dict[str, Any]) -> None:
    titles = {
        "policy": "policy",
        "bytes": counted(report["batch"], "row"),
        "share": "of none",
        "largest_batch": "largest batch",
        "measured_bytes": "measured",
        "tokens_per_second": "tokens/s",
        "speed": "to none",
    }
    rows, first = [], report["rows"][0]
    for row in report["rows"]:
        shown = {"policy": row["policy"], "bytes": human_bytes(row["bytes"])}
        shown["share"] = f"{row['row_bytes'] / first['row_bytes']:.3f}"
        if "largest_batch" in row:
            shown["largest_batch"] = f"{row['largest_batch']:,}"
        if "measured_bytes" in row:
            shown["measured_bytes"] = human_bytes(row["measured_bytes"])
            shown["tokens_per_second"] = f"{row['tokens_per_second']:,.1f}"
            shown["speed"] = f"{row['tokens_per_second'] / first['tokens_per_second']:.2f}x"
        rows.append(shown)
    title = f"State of {titles['bytes']}, none at {counted(report['context'], 'token')}"
    columns = [Column(titles[name], number=name != "policy") for name in rows[0]]
    table(console, title, columns, [tuple(shown.values()) for shown in rows])
    if report["memory"] is not None:
        weights = human_bytes(report["weights_bytes"])
        console.print(f"in {human_bytes(report['memory'])}, of which weights {weights}")


def _is_ours(model: str) -> bool:
    from statewright.models.any_model import is_ours
    from statewright.models.load import read_config

    path = Path(model)
    return path.is_dir() and is_ours(read_config(path))


def _config(model: str | None, family: str | None, options: dict[str, Any]) -> Any:
    if family is not None:
        from statewright.hf.families import tiny_config

        return tiny_config(family)
    from statewright.hf.loading import load_config

    return load_config(model, options["trust_remote_code"])


def _peak(model: str | None, family: str | None, options: dict[str, Any]) -> dict[str, int]:
    from statewright.checks.peak import reading_peak

    net = _net(model, family, options)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        peak = reading_peak(net, options["context"], options["batch"])
    for text in dict.fromkeys(str(w.message) for w in notes if w.category is UserWarning):
        click.echo(f"statewright: {text}", err=True)
    return peak


def _net(model: str | None, family: str | None, options: dict[str, Any]) -> Any:
    from statewright.hf.families import tiny
    from statewright.models.any_model import load_any

    if model is None:
        return tiny(family)
    return load_any(model, None, options["trust_remote_code"])


def _table(console: Any, report: dict[str, Any]) -> None:
    rows = []
    for i, layer in enumerate(report["layers"]):
        inside = ", ".join(f"{name} {count:,}" for name, count in layer["tensors"].items())
        rows.append((str(i), layer["kind"], inside, f"{layer['bytes']:,}"))
    layer, sizes = Column("layer", number=True), Column("bytes", number=True)
    title = f"State of {counted(report['batch'], 'row')}"
    table(console, title, [layer, "kind", Column("tensors", words=True), sizes], rows)
    ratio = report["transformer_bytes"] / max(report["state_bytes"], 1)
    when = f"at {report['context']:,} tokens" if report["grows"] else "at any length"
    cross = report["crossover_tokens"]
    kinds = ", ".join(f"{kind} {human_bytes(n)}" for kind, n in report["kinds"].items())
    console.print(
        f"state            {human_bytes(report['state_bytes']):>12}  {when} ({kinds})\n"
        f"Transformer      {human_bytes(report['transformer_bytes']):>12}  "
        f"at {report['context']:,} tokens ({ratio:,.1f}x)\n"
        f"crossover        {'never' if cross is None else f'{cross:,}':>12}  tokens"
    )
    if "peak" in report:
        peak = report["peak"]
        console.print(
            f"measured         {human_bytes(peak['state_bytes']):>12}  held after reading "
            f"{report['context']:,} tokens, our positions included\n"
            f"peak             {human_bytes(peak['peak_bytes']):>12}  more than before, while "
            f"reading in pieces of {peak['chunk']:,}"
        )
