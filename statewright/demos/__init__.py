"""Small trained models that come with the package, each with something to see, and a text.

`demo:collapsed`, a Mamba-2 that never learned to forget; `demo:transformer`, a byte Transformer
in transformers' Llama format; `demo:recall`, a GLA whose state is too small for what it looks up.
Every verb takes these names for a model; `examples/demo_models.py` made them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from statewright.places import cache_directory, new_directory

PREFIX = "demo:"
MODELS = {
    "collapsed": "a Mamba-2 trained on texts of 64 bytes that never learned to forget",
    "transformer": "a byte Transformer in the Llama format, trained on texts of 512 bytes",
    "recall": "a GLA whose state is too small for the pairs it should look up",
}
TEXT = "book.txt"
_HERE = Path(__file__).parent
_WEIGHTS, _ABOUT = "model.safetensors", "about.json"


def locate(name: str) -> Path | None:
    """The directory of a demo model in float32, made at first use; None if `name` is not of ours.

    It lies in the cache directory, under a name that changes with the weights. Raises ValueError
    for an unknown `demo:` name.
    """
    if not name.startswith(PREFIX):
        return None
    known = name.removeprefix(PREFIX)
    if known not in MODELS:
        near = difflib.get_close_matches(known, MODELS, 1)
        hint = f"; did you mean '{PREFIX}{near[0]}'?" if near else ""
        raise ValueError(f"{name}: not one of {', '.join(PREFIX + m for m in MODELS)}{hint}")
    digest = about(known)["sha256"]
    target = _unpacked() / digest[:12] / known
    if not target.is_dir():
        _unpack(known, target)
    return target


def called(model: str | Path) -> str:
    """What a user calls a model: `demo:recall` for the directory that holds it, else itself."""
    path = Path(model)
    ours = path.name in MODELS and path.parent.parent == _unpacked()
    return PREFIX + path.name if ours else str(model)


def _unpacked() -> Path:
    return cache_directory() / PREFIX.rstrip(":")


def about(model: str) -> dict[str, Any]:
    """How a demo model was made: command, seed, data with its digest, sha256 of its weights."""
    return json.loads((_HERE / model / _ABOUT).read_text(encoding="utf-8"))


def text() -> str:
    """The beginning of Moby-Dick, which none of the models was trained on."""
    return (_HERE / TEXT).read_text(encoding="utf-8")


def write(directory: str | Path) -> list[Path]:
    """Put the models and the text into `directory` and return their paths, models first.

    What already lies there stays if it is the same. Raises ValueError, before anything is written,
    for a file or directory of one of these names that holds something else.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: not a directory")
    models = {directory / name: locate(PREFIX + name) for name in MODELS}
    book = directory / TEXT
    for target, source in models.items():
        if target.exists() and not _same(source, target):
            raise ValueError(f"{target}: there is something else of this name; choose another DIR")
    if book.exists() and (not book.is_file() or book.read_bytes() != (_HERE / TEXT).read_bytes()):
        raise ValueError(f"{book}: there is something else of this name; choose another DIR")
    for target, source in models.items():
        if not target.exists():
            with new_directory(target) as scratch:
                shutil.copytree(source, scratch, dirs_exist_ok=True)
    if not book.exists():
        shutil.copyfile(_HERE / TEXT, book)
    return [*models, book]


def _same(source: Path, target: Path) -> bool:
    """Whether a directory holds every file of the source as it is."""
    files = [file for file in source.iterdir() if file.is_file()]
    other = [target / file.name for file in files]
    return all(o.is_file() and o.read_bytes() == f.read_bytes() for f, o in zip(files, other))


def _unpack(model: str, target: Path) -> None:
    """The shipped bfloat16 weights as float32, which every CPU computes in."""
    import torch
    from safetensors.torch import load

    from statewright.state_file import write_tensors

    source = _HERE / model
    packed = (source / _WEIGHTS).read_bytes()
    if hashlib.sha256(packed).hexdigest() != about(model)["sha256"]:
        raise ValueError(f"{source / _WEIGHTS}: not the file that the package came with")
    tensors = {name: tensor.to(torch.float32) for name, tensor in load(packed).items()}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n"

    with new_directory(target) as scratch:
        for file in source.iterdir():
            if file.name not in ("config.json", _WEIGHTS):
                shutil.copyfile(file, scratch / file.name)
        write_tensors(scratch / _WEIGHTS, tensors, {"format": "pt"})
        (scratch / "config.json").write_text(config, encoding="utf-8")
