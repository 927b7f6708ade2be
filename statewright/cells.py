"""An experiment as named cells in one JSON file: what is there is not run again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One result: `key` says everything that it depends on; `run` returns what JSON can hold."""

    key: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """A cell that has run: its result, with the `seconds` it took."""

    key: str
    result: dict[str, Any]


Runner = Callable[[Iterable[Cell]], Iterator[Done]]


def in_turn(cells: Iterable[Cell]) -> Iterator[Done]:
    """Run them here, one after another."""
    for cell in cells:
        began = time.perf_counter()
        result = cell.run()
        yield Done(cell.key, {**result, "seconds": round(time.perf_counter() - began, 2)})


def read_cells(path: str | Path) -> dict[str, Any]:
    """The file's {"about": ..., "cells": {key: result}}; empty if there is none.

    Raises ValueError for a file that is not one of these.
    """
    path = Path(path)
    if not path.exists():
        return {"about": {}, "cells": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("cells"), dict):
        raise ValueError(f"{path}: no results file (it has no cells)")
    return found


def run_cells(
    cells: Iterable[Cell], path: str | Path, about: dict[str, Any], runner: Runner = in_turn
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run what is missing, in order, and write the file after each; yields (key, result).

    The file is replaced, never half-written, so a run may be killed at any time and called again.
    Each result gets `seconds`. `about` is kept per run that added something. `runner` may run
    cells elsewhere and side by side; only this process writes. Raises ValueError for two cells
    with the same key.
    """
    cells = list(cells)
    keys = [cell.key for cell in cells]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"run_cells: two cells are called {twice!r}")
    missing = (cell for cell in cells if cell.key not in read_cells(path)["cells"])
    for done in runner(missing):
        # Read again: another process may have added cells meanwhile.
        found = read_cells(path)
        found["about"] = {**found["about"], **about}
        found["cells"][done.key] = done.result
        write_json(path, found)
        yield done.key, done.result


def write_json(path: str | Path, found: dict[str, Any]) -> None:
    """Replace the file, whole or not at all; its directory is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
