"""Any causal LM by directory, id or short name: ours where it is ours, else transformers'."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from statewright.hf.loading import load_causal_lm
from statewright.hf.pretrained import locate
from statewright.models.convert import FAMILIES
from statewright.models.load import OURS, load, read_config
from statewright.models.tokenizers import saved_tokenizer


def load_any(
    path: str | Path, dtype: torch.dtype | None = torch.float32, trust_remote_code: bool = False
) -> Any:
    """The model at `path` in evaluation mode: a StatewrightForCausalLM if that is what lies there.

    A family that both know (Mamba, Mamba-2) is loaded by transformers, as its users run it.
    Raises ValueError, in one line, for whatever cannot be loaded.
    """
    if (Path(path) / "config.json").is_file() and is_ours(read_config(Path(path))):
        return load(path, dtype)
    if Path(path).is_dir():
        read_config(Path(path))  # says which checkpoint was meant
    return load_causal_lm(path, dtype, trust_remote_code)


def load_probed(path: str | Path) -> Any:
    """As `load_any` in float32, but a family that we can convert becomes ours: its gates are seen.

    What cannot be converted is read through transformers, with a warning that says why.
    """
    found = (Path(path) / "config.json").is_file() and read_config(Path(path))
    if found and found.get("model_type") in FAMILIES:
        try:
            return load(path, "float32")
        except ValueError as error:
            message = f"{path}: read through transformers, its gates unseen ({error})"
            warnings.warn(message, stacklevel=2)
    return load_any(path)


def opened(model: Any, probed: bool = False) -> Any:
    """A model as it was given; a directory, id or short name as the model that it means."""
    if not isinstance(model, str | Path):
        return model
    path = locate(model)
    return load_probed(path) if probed else load_any(path)


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The one given, else the one saved with a model that was given by its place, else None."""
    if tokenizer is None and isinstance(model, str | Path):
        return saved_tokenizer(locate(model))
    return tokenizer


def is_ours(config: dict[str, Any]) -> bool:
    """Ours, or a family that only we can load: fla's GLA, the original Mamba layout."""
    kind = config.get("model_type")
    return kind in (OURS, "gla") or (kind is None and "ssm_cfg" in config)
