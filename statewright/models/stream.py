"""Checkpoints tensor by tensor: read from safetensors files and written to new ones.

Nothing is mapped into memory, so what is resident is what was asked for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        count = math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = bytearray(count * self.dtype.itemsize)
        with self.file.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.file}: damaged (it ends inside a tensor)")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors checkpoint, by name; only headers are read.

    Raises ValueError for other layouts and for damaged or missing files.
    """
    if (directory / _SINGLE).is_file():
        files = [_SINGLE]
    elif (directory / _INDEX).is_file():
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{directory / _INDEX}: damaged ({error})") from error
    else:
        raise ValueError(
            f"{directory}: no {_SINGLE} or {_INDEX} there; other layouts become ours with "
            "statewright convert --to statewright"
        )
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= _header(directory / file)
    return entries


def _header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise ValueError(f"{file}: a shard of the checkpoint is missing")
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"{file}: damaged (no header)")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            found = {name: _entry(file, 8 + length, e) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged or of an unknown dtype ({error!r})") from error
    for name, entry in found.items():
        if entry.begin + math.prod(entry.shape) * entry.dtype.itemsize > size:
            raise ValueError(f"{file}: damaged ({name} reaches beyond its end)")
    return found


def _entry(file: Path, offset: int, raw: Mapping[str, Any]) -> Entry:
    begin, end = raw["data_offsets"]
    dtype, shape = _DTYPES[raw["dtype"]], tuple(raw["shape"])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {shape}")
    return Entry(file, offset + begin, dtype, shape)


def write_shards(
    directory: Path,
    like: Mapping[str, Tensor],
    tensors: Iterator[tuple[str, Tensor]],
    max_bytes: int,
) -> None:
    """Write tensors as they come, in the order of `like` (meta tensors), in files of `max_bytes`.

    One file, or shards with an index as transformers writes them; a larger tensor has its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in like.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [_SINGLE] if count == 1 else files
    for file, shard in zip(files, shards):
        _write(directory / file, shard, tensors)
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        total = sum(tensor.nbytes for tensor in like.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, shard: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in shard.items():
        span = [at, at + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, want in shard.items():
            came, tensor = next(tensors)
            assert (came, tensor.shape, tensor.dtype) == (name, want.shape, want.dtype)
            if tensor.numel():
                file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
