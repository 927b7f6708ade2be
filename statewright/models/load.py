"""`statewright.load(path)`: a checkpoint in, our model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from statewright.models.config import StatewrightConfig
from statewright.models.lm import StatewrightForCausalLM


def load(path: str | Path, **kwargs: Any) -> StatewrightForCausalLM:
    """Load a model directory in evaluation mode; `kwargs` go to `from_pretrained` (dtype, ...).

    Raises ValueError, in one line, for a directory without a model, another model type, a damaged
    file, and weights that are missing, unexpected or of another shape than the config says.
    """
    path = Path(path)
    config = _read_config(path)
    kind = config.get("model_type")
    if kind != StatewrightConfig.model_type:
        raise ValueError(f"{path}: model type {kind!r} is not supported, expected 'statewright'")
    try:
        model, report = StatewrightForCausalLM.from_pretrained(
            path, output_loading_info=True, local_files_only=True, **kwargs
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: cannot be loaded ({_first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = ", ".join(map(str, sorted(report[problem])[:3]))
            raise ValueError(f"{path}: {problem.replace('_keys', '')} weights: {names}")
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        newest = sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        hint = f"; did you mean {newest[-1]}?" if newest else ""
        raise ValueError(f"{path}: no model there (no config.json){hint}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
