"""Two lines beside a checkpoint, so that `trust_remote_code=True` finds the installed package."""

from __future__ import annotations

import json
import os
from pathlib import Path

_FILE = "modeling_statewright.py"
_SOURCE = """\
# Loads the classes from the installed package (pip install statewright).
from statewright.models import StatewrightConfig, StatewrightForCausalLM, StatewrightModel
"""


def write_shim(directory: str | os.PathLike[str]) -> None:
    """Name our classes in config.json's auto_map and write the file that imports them."""
    directory = Path(directory)
    (directory / _FILE).write_text(_SOURCE, encoding="utf-8")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    module = _FILE.removesuffix(".py")
    config["auto_map"] = {
        "AutoConfig": f"{module}.StatewrightConfig",
        "AutoModel": f"{module}.StatewrightModel",
        "AutoModelForCausalLM": f"{module}.StatewrightForCausalLM",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
