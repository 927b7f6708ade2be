"""An experiment as named cells in one JSON file; the mechanism is `statewright.cells`."""

from __future__ import annotations

from statewright.cells import Cell, read_cells, run_cells

__all__ = ["Cell", "read_cells", "run_cells"]
