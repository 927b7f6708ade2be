"""`statewright convert`: a checkpoint of one library as one of another."""

from __future__ import annotations

from pathlib import Path

import click

from statewright.cli.common import mixers_of
from statewright.cli.show import json_option, show
from statewright.cli.types import MODEL
from statewright.demos import called


@click.command()
@click.argument("model", type=MODEL)
@click.option("--to", "target", required=True, type=click.Choice(["statewright", "hf", "fla"]))
@click.option("--output-dir", required=True, type=click.Path(), help="Must be empty or absent.")
@json_option
def convert(model: str, target: str, output_dir: str, as_json: bool) -> None:
    """Convert MODEL (ours, transformers' mamba or mamba2, state-spaces', fla's gla).

    \b
    Example: statewright convert run --to hf --output-dir theirs

    Tokenizer files are copied. What a format cannot express is refused, with the reason.
    """
    from statewright.cli.common import quiet_libraries
    from statewright.models import load
    from statewright.models.load import save_as
    from statewright.models.tokenizers import saved_tokenizer

    quiet_libraries()
    directory, source = Path(output_dir), Path(model)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: not empty; choose another --output-dir")
    net = load(source)
    if target == "statewright":
        net.save_pretrained(directory)
        if (source / "tokenizer_config.json").exists():
            saved_tokenizer(source).save_pretrained(directory)
    else:
        save_as(net, target, directory, source)
    found = {
        "model": called(model),
        "mixer": net.config.mixer,
        "output_dir": output_dir,
        "to": target,
    }
    said = f"{called(model)} ({mixers_of(net.config)}) -> {directory} ({target})"
    show(found, as_json, lambda to, _: to.print(said, soft_wrap=True))
