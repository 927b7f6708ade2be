"""`statewright resize`: a larger or smaller state for some layers of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from statewright.cli.common import human_bytes
from statewright.cli.show import json_option, show
from statewright.cli.types import MODEL, POSITIVE, SEED, TEXT, Count


@click.command()
@click.argument("model", type=MODEL)
@click.option("--key", default="4x", show_default=True, help="Factor: 4x, 0.5x; all: GLA's heads.")
@click.option("--heads", help="Instead: the share of GLA's heads to keep, e.g. 0.5x.")
@click.option(
    "--layers", default="every:6", show_default=True, help="all, every:6, last:4, 0,6,12."
)
@click.option("--init", default="zero", show_default=True, help="How what is new starts.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of what is new.")
@click.option("--text", type=TEXT, help="To shrink: a text that says which keys matter.")
@click.option(
    "--length", type=Count(2), default=512, show_default=True, help="Tokens per row of it."
)
@click.option(
    "--rows", type=POSITIVE, default=8, show_default=True, help="Rows of it that are read."
)
@click.option("--output-dir", type=click.Path(), help="Where the new model is written.")
@click.option("--dry-run", is_flag=True, help="Only say what would change; config.json suffices.")
@json_option
def resize(model: str, key: str, layers: str, init: str, output_dir: str | None, **options: Any):
    """Give chosen layers of MODEL a state --key times as large (or small); train it on afterwards.

    \b
    Example: statewright resize run --key 4x --output-dir larger

    zero keeps the function exactly and learns; fresh is StateX's re-initialisation; as-released,
    inherit, copy and zero-zero reproduce others. MODEL is never changed: the new one appears
    in --output-dir when it is complete, and every command reads it as any other.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.models.resize_file import plan_for, resize_checkpoint

    quiet_libraries()
    if output_dir is None and not options["dry_run"]:
        raise click.UsageError("give --output-dir, or --dry-run to see what would change")
    source = Path(model)
    plan = plan_for(source, key=key, layers=layers, init=init, heads=options["heads"])
    found = _report(plan)
    if not options["dry_run"]:
        directory = Path(output_dir)
        if plan.shrinks:
            found |= _shrink(source, directory, plan, options)
        else:
            resize_checkpoint(source, directory, plan, options["seed"])
        found["output_dir"] = str(directory)
    show(found, options["as_json"], _draw)


def _report(plan: Any) -> dict[str, Any]:
    return {
        "init": "energy" if plan.shrinks else plan.init,
        "factor": float(plan.factor),
        "layers": list(plan.layers),
        "mixers": {str(i): plan.after.mixer_of(i) for i in plan.layers},
        "state_bytes": list(plan.state_bytes),
        "parameters": list(plan.parameters),
    }


def _shrink(source: Path, directory: Path, plan: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Keep the keys with most energy on the text; its loss before and after, in nats."""
    import torch

    from statewright.models import load
    from statewright.models.load import copy_tokenizer
    from statewright.models.resize import resize as resized
    from statewright.models.resize_file import publish
    from statewright.models.tokenizers import saved_tokenizer
    from statewright.text_file import read_text
    from statewright.train.data import corpus_of

    if not options["text"]:
        raise click.UsageError("a factor below 1 needs --text, which says what matters")
    length, rows = options["length"], options["rows"]
    corpus = corpus_of([read_text(options["text"])], saved_tokenizer(source))
    if corpus.num_tokens < length * rows:
        raise ValueError(
            f"{options['text']}: {corpus.num_tokens} tokens, {rows} rows of {length} need more"
        )
    starts = torch.linspace(0, corpus.num_tokens - length, rows).long().tolist()
    pieces = [torch.from_numpy(corpus.tokens[s : s + length].astype("int64")) for s in starts]
    ids, net = torch.stack(pieces), load(source)
    asked = {plan.part: plan.factor, "layers": plan.layers, "init": plan.init}
    new = resized(net, seed=options["seed"], calibration=ids, **asked)

    def write(at: Path) -> None:
        new.save_pretrained(at)
        copy_tokenizer(source, at)

    publish(directory, write)
    with torch.no_grad():
        return {"nats": [float(m(ids, labels=ids).loss) for m in (net, new)]}


def _draw(console: Any, found: dict[str, Any]) -> None:
    layers, (small, large) = found["layers"], found["state_bytes"]
    mixers = list(found["mixers"].values())
    console.print(f"layers {', '.join(map(str, layers))} -> {mixers[0]}, init {found['init']}")
    console.print(
        f"state      {human_bytes(small)} -> {human_bytes(large)} per sequence "
        f"({large / small:.2f} x)"
    )
    before, after = found["parameters"]
    added = after - before
    console.print(f"parameters {before:,} -> {after:,} ({added:+,}, {added / before:+.2%})")
    if "nats" in found:
        old, new = found["nats"]
        console.print(f"loss       {old:.4f} -> {new:.4f} nats ({new - old:+.4f}) on the text")
    if "output_dir" in found:
        console.print(f"model      {found['output_dir']}", soft_wrap=True)
