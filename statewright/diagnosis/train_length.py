"""How long a model's training texts were: from its records or its owner, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from statewright.train.checkpoint import RUN_FILE, checkpoints

_KEY = "train_length"


def known_train_length(config: Any, directory: str | Path | None = None) -> tuple[int, str] | None:
    """(tokens, where that stands): the config's `train_length`, or a run's record; else None.

    Looks at the record of the newest checkpoint in the directory, or of the checkpoint that it is.
    A config's largest position is no training length, so it is not taken for one.
    """
    found = getattr(config, _KEY, None)
    if isinstance(found, int) and found > 0:
        return found, "config.json"
    if directory is None or not Path(directory).is_dir():
        return None
    own = Path(directory) / RUN_FILE
    if own.is_file():
        try:
            record = json.loads(own.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{own}: damaged ({error})") from error
    else:
        runs = checkpoints(directory)
        record = runs[-1].record if runs else {}
    length = record.get("config", {}).get("length") if isinstance(record, dict) else None
    return (length, RUN_FILE) if isinstance(length, int) else None


def train_length_of(given: int | None, config: Any, directory: str | Path | None) -> int:
    """The given one, else the known one. Raises ValueError that asks for it."""
    if given is not None:
        return given
    known = known_train_length(config, directory)
    if known is None:
        raise ValueError(
            "the training length of this model is not recorded, and everything is judged by it: "
            "give train_length=N, the tokens of one training text"
        )
    return known[0]
