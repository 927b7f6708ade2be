"""What the studies share: systems by name and depth, and results that know their settings."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from statewright.intervals import estimate, spread
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.provenance import hardware, versions
from statewright.studies.cells import read_cells

Listener = Callable[[dict[str, Any]], None]
# What a name stands for: the entries of a StatewrightConfig that are its own.
Systems = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where a study's cells run: a directory for unfinished runs, a device, and who is told."""

    work: Path
    device: torch.device
    listen: Listener

    def snapshot(self, key: str) -> Path:
        """The file in which an unfinished run waits."""
        return self.work / f"{key}.safetensors"


@dataclass(frozen=True)
class System:
    """A model to train: one of a study's names and a number of layers, written `mingru/3`."""

    name: str
    layers: int

    def __str__(self) -> str:
        return f"{self.name}/{self.layers}"

    @classmethod
    def parse(cls, text: str, known: Iterable[str]) -> System:
        """ValueError for an unknown name or a number of layers that is none."""
        name, _, layers = text.partition("/")
        names = sorted(known)
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown system {name!r}{hint} (known: {', '.join(names)})")
        if not layers.isdecimal() or int(layers) < 1:
            raise ValueError(f"system {text!r}: expected a name and a depth, such as {name}/3")
        return cls(name, int(layers))

    def build(
        self, systems: Systems, seed: int, device: torch.device, **shared: Any
    ) -> StatewrightForCausalLM:
        """The model, its weights drawn from the seed."""
        config = StatewrightConfig(
            num_hidden_layers=self.layers, **{**shared, **systems[self.name]}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return StatewrightForCausalLM(config).to(device)


def about(study: str, settings: Any, command: str, device: torch.device) -> dict[str, Any]:
    """What results must carry to be believed."""
    return {
        "study": study,
        "settings": _plain(asdict(settings)),
        "command": command,
        "versions": versions(("statewright", "torch", "numpy")),
        "python": platform.python_version(),
        "device": hardware(device.type),
        "threads": torch.get_num_threads(),
    }


def check_resumable(path: str | Path, study: str, settings: Any) -> None:
    """ValueError if the file holds results of another study, or of other settings than these."""
    found = read_cells(path)["about"]
    if not found:
        return
    if found.get("study") != study:
        raise ValueError(f"{path}: holds the study {found.get('study')!r}, not {study!r}")
    new = _plain(asdict(settings))
    # An option that came after these results were written had its default then.
    old = {**_plain(asdict(type(settings)())), **found.get("settings", {})}
    other = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if other:
        said = ", ".join(f"{name}={old.get(name)} (now {new.get(name)})" for name in other)
        raise ValueError(f"{path}: was made with other settings: {said}; choose another file")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def read_study(path: str | Path, study: str | None = None) -> dict[str, Any]:
    """A study's results; ValueError if the file holds none, or another study's."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    found = read_cells(path)
    if not found["cells"]:
        raise ValueError(f"{path}: holds no results yet")
    if study is not None and found["about"].get("study") != study:
        raise ValueError(f"{path}: holds the study {found['about'].get('study')!r}, not {study!r}")
    return found


def over_seeds(cells: Mapping[str, Any], read: Callable[[dict], float]) -> dict[str, list[float]]:
    """Cells called .../seedN, gathered by what stands before the seed, in order of appearance."""
    gathered: dict[str, list[float]] = {}
    for key, result in cells.items():
        gathered.setdefault(key.rpartition("/")[0], []).append(read(result))
    return gathered


def over_seeds_shown(values: Sequence[float], digits: int = 1) -> str:
    """`94.3 ± 1.6`: the mean and the standard deviation of seeds, as papers give them; one seed has
    none."""
    deviation, mean = spread(values), estimate(values).mean
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
