"""`train --resume`: which options a run that is there may be given, and the run that goes on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from statewright.train.config import TrainConfig

# The data are held against the record by their content, not by where they lie.
_OWN = {"text", "data", "output_dir", "resume", "valid_text", "tensorboard", "device", "preset"}
# What a step computes does not depend on these.
_SAME_STEPS = {"parallel", "num_accumulation", "checkpointing"}
_CHANGEABLE = _SAME_STEPS | {"eval_every", "save_every", "num_checkpoints"}
_TRAINING = {field.name for field in fields(TrainConfig)}
# Options of a new model, by their names in its config.
_MODEL = {
    "mixer": "mixer",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "conv_kernel": "conv_kernel",
    "mlp_ratio": "mlp_ratio",
    "norm": "norm",
    "dropout": "dropout",
}
_GIVEN = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)


def is_begun(directory: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any(directory.glob("checkpoint-*/run.json"))


def given(ctx: click.Context) -> set[str]:
    """The options that were given, by name or by a preset."""
    return {name for name in ctx.params if ctx.get_parameter_source(name) in _GIVEN}


def refuse_other_options(ctx: click.Context) -> None:
    """For `--resume` alone, which takes the run's own options. UsageError names all others."""
    source = click.core.ParameterSource.COMMANDLINE
    told = [n for n in ctx.params if ctx.get_parameter_source(n) is source]
    other = [n for n in told if n not in (_OWN - {"preset"}) | _SAME_STEPS]
    if other:
        names = ", ".join(map(_option, other))
        raise click.UsageError(f"--resume takes the run's own options; leave out {names}", ctx)


def changes(
    names: set[str], options: dict[str, Any], record: dict[str, Any], model_config: Any
) -> dict[str, Any]:
    """Of the options given: those of training that a run may take on, which are its own if it has
    them already.

    More steps extend a run. Raises ValueError for what would make it another one, by name and with
    both values: fewer steps, and any other option of the model, the data or the training.
    """
    config, changed, other = {**_defaults(), **record["config"]}, {}, []
    for name in sorted(names & _TRAINING):
        new, old = options[name], config[name]
        if name in _CHANGEABLE or new == old or (name == "num_steps" and new > old):
            changed[name] = new
        else:
            other.append((name, new, old))
    theirs = {name: _listed(getattr(model_config, own)) for name, own in _MODEL.items()}
    theirs["valid_share"] = record["valid_share"]
    theirs |= {name: record.get(name) for name in ("tokenizer", "model")}
    for name in sorted(names & theirs.keys()):
        new = located(options[name]) if name == "model" else _listed(options[name])
        if new != theirs[name]:
            other.append((name, new, theirs[name]))
    for name, kind in (("text", "data_files"), ("data", "text")):
        if name in names and record.get(kind):
            other.append((name, "given", f"made with --{'text' if name == 'data' else 'data'}"))
    if other:
        told = "; ".join(f"{_option(n)} {_shown(a)} (it has {_shown(b)})" for n, a, b in other)
        raise ValueError(f"{options['output_dir']} holds another run than {told}")
    return changed


def located(model: str | None) -> str | None:
    """A directory by its whole path, an id as it is."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(TrainConfig)}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(value: Any) -> Any:
    """A mixer is one spec or several."""
    if isinstance(value, list | tuple):
        return list(value) if len(value) != 1 else value[0]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(str, value))
    return "none" if value is None else str(value)
