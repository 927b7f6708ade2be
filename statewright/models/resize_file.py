"""Resize a checkpoint on disk, one group of tensors at a time: a layer is all that is in memory."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from statewright.models.convert.family import Family
from statewright.models.lm import StatewrightForCausalLM
from statewright.models.load import config_of, copy_tokenizer, read_config
from statewright.models.resize import Plan, meta_model, plan_resize, resized_group
from statewright.models.shim import write_shim
from statewright.models.stream import Entry, read_entries, write_shards
from statewright.models.weights import fit

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SHARD = 5 * 1000**3
_BESIDE = ("generation_config.json", "chat_template.jinja")


def plan_for(source: Path, **options: object) -> Plan:
    """`plan_resize` for a checkpoint directory: its config.json is enough."""
    config, _ = config_of(read_config(source), source)
    return plan_resize(config, **options)


def resize_checkpoint(
    source: Path, directory: Path, plan: Plan, seed: int = 0, max_shard: int = _SHARD
) -> None:
    """Write `source` (any format that `load` takes, in safetensors) resized, in our format.

    Peak memory is one layer before and after, or the largest single tensor. The source is only
    read; `directory` (new or empty) appears when it is complete. Raises ValueError for a
    checkpoint that is damaged or does not fit its config, and for a plan that shrinks.
    """
    if plan.shrinks:
        raise ValueError("resize_checkpoint: a shrink needs the model to read a text; use resize")
    _, family = config_of(read_config(source), source)
    entries = read_entries(source)
    groups = _groups(entries)
    with torch.device("meta"):
        metas = {n: torch.empty(e.shape, dtype=e.dtype) for n, e in entries.items()}
    before = {k: _ours(family, {n: metas[n] for n in names}) for k, names in groups.items()}
    flat = {name: t for group in before.values() for name, t in group.items()}
    fit(meta_model(plan.before), flat, str(source))
    shapes = {n: t.shape for n, t in meta_model(plan.after).state_dict().items()}
    dtypes = {name: tensor.dtype for name, tensor in flat.items()}
    added = next(t.dtype for t in flat.values() if t.is_floating_point())
    like = {}
    for layer, group in before.items():
        new = [n for n in shapes if n not in group and n.startswith(f"model.layers.{layer}.")]
        for name in [*group, *new]:
            dtype = dtypes.get(name, added)
            like[name] = torch.empty(shapes[name], dtype=dtype, device="meta")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        order = iter(like)
        for layer, names in groups.items():
            group = _ours(family, {name: entries[name].read() for name in names})
            group = resized_group(plan, layer, group, seed)
            for _ in range(len(group)):
                name = next(order)
                yield name, group.pop(name)

    def write(at: Path) -> None:
        write_shards(at, like, tensors(), max_shard)
        _write_config(plan, at, added)
        copy_tokenizer(source, at)
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, at / name)

    publish(directory, write)


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside, then rename it into place; ValueError if it is full."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: not empty; choose another --output-dir")
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        for path in [*beside.iterdir(), beside]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        beside.replace(directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _groups(entries: dict[str, Entry]) -> dict[int, list[str]]:
    """Names by layer; tensors of no layer are groups of their own, counted down from -1."""
    groups: dict[int, list[str]] = {}
    alone = -1
    for name in entries:
        match = _LAYER.search(name)
        if match:
            groups.setdefault(int(match[1]), []).append(name)
        else:
            groups[alone] = [name]
            alone -= 1
    return groups


def _ours(family: Family | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if family is None else family.weights_in(tensors)


def _write_config(plan: Plan, directory: Path, dtype: torch.dtype) -> None:
    values = plan.after.to_dict()
    values |= {"architectures": [StatewrightForCausalLM.__name__]}
    values["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    write_shim(directory)
