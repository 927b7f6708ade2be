"""`statewright size --plan`: the training length that a state needs, and what it can recall."""

from __future__ import annotations

from typing import Any

import click

from statewright.cli.show import emit


def show_plan(numbers: int, results: str | None, as_json: bool) -> None:
    """For a state of so many numbers; `results`: a file of `statewright capacity`."""
    from statewright.studies.capacity_plan import plan
    from statewright.studies.experiment import read_study

    found = plan(numbers, None if results is None else read_study(results, "capacity"))
    if as_json:
        emit(found.as_dict())
        return
    click.echo(f"state of {found.numbers:,} numbers ({found.numbers / 1e6:.4g} M)")
    for estimate in found.estimates:
        said = "nothing"
        if estimate.tokens:
            said = f"{estimate.tokens:,} tokens ({estimate.low:,} to {estimate.high:,})"
        click.echo(f"T_{estimate.kind:<6} by {estimate.source}: {said}; {estimate.note}")
    if found.train_length:
        click.echo(f"train on texts of about {found.train_length:,} tokens: the band's upper end")
    else:
        click.echo("no training length can be named: measure one with statewright capacity")


def numbers_of(model: str | None, config: Any | None) -> int:
    """Numbers in one sequence's recurrent state: of our model's directory, or by a config."""
    import torch

    if model is not None:
        from statewright.models import load
        from statewright.studies.capacity_model import state_numbers

        return state_numbers(load(model))
    from statewright.hf.sizing import layer_sizes

    sizes = layer_sizes(config, 1, torch.float32)
    return sum(entry.at(1).get("recurrent", 0) for entry in sizes) // torch.float32.itemsize
