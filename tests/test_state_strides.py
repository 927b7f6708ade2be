"""A State may hold views; files are written from their values."""

from __future__ import annotations

from pathlib import Path

import torch

from statewright.state import VectorState
from statewright.state_file import load_state, save_state


def test_an_axis_of_one_may_have_any_stride(tmp_path: Path) -> None:
    """A view such as seen[::7] of one row has stride 7 and still counts as contiguous."""
    seen = torch.arange(7)[::7]
    assert seen.stride() == (7,) and seen.is_contiguous()
    state = VectorState(h=torch.randn(1, 3), seen=seen)
    save_state(state, tmp_path / "s")
    assert torch.equal(load_state(tmp_path / "s").seen, seen)
