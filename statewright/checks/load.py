"""Any causal LM by path, id or family: ours where it is ours, else transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from statewright.hf.loading import load_causal_lm
from statewright.models import load
from statewright.models.load import OURS, read_config


def load_any(
    path: str, dtype: torch.dtype | None = torch.float32, trust_remote_code: bool = False
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


def is_ours(config: dict[str, Any]) -> bool:
    """Ours, or a family that only we can load: fla's GLA, the original Mamba layout."""
    kind = config.get("model_type")
    return kind in (OURS, "gla") or (kind is None and "ssm_cfg" in config)
