"""--tensorboard writes what metrics.jsonl holds; without the package it says what to install."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from statewright.cli import main

TRAIN = ["train", "--text", "t.txt", "--output-dir", "run", "--num-steps", "3", "--tensorboard"]
TRAIN += ["--num-lanes", "2", "--length", "16", "--hidden-size", "8", "--num-layers", "1"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("A short text about nothing in particular. " * 20)
    return tmp_path


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_events_hold_the_metrics(text: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(TRAIN) == 0
    found = EventAccumulator(str(text / "run" / "tensorboard"))
    found.Reload()
    lines = map(json.loads, (text / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert [event.value for event in found.Scalars("step/loss")] == pytest.approx(losses, rel=1e-6)
    assert len(found.Scalars("held_out/nats")) == 1


def test_absence_is_one_line(text: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(TRAIN) == 1
    assert "statewright[track]" in capsys.readouterr().err.splitlines()[-1]
