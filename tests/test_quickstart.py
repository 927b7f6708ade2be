"""Quickstart: what it shows holds, on a fresh machine, at any width."""

from __future__ import annotations

import importlib
import io
import json
import signal
from pathlib import Path

import pytest
from test_cli import Ran, assert_refused, fingerprint

from statewright.cli import progress


@pytest.fixture
def run(capsys):
    return lambda *argv: Ran(capsys, *argv)


def test_quickstart(tmp_path: Path, run, monkeypatch) -> None:
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path / "nothing"))
    target = tmp_path / "quick"
    argv = ["quickstart", "--output-dir", target, "--seconds", "30"]
    ran = run(*argv)
    assert ran.code == 0, ran.err
    assert ran.out.count("identical") == 3 and "DIFFERENT" not in ran.out
    assert_effects(json.loads((target / "quickstart.json").read_text())["effects"])
    before = fingerprint(target)
    texted = ["quickstart", "--output-dir", target, "--text"]
    assert_refused(run(*texted, tmp_path / "none.txt"), "no such file")
    (tmp_path / "short.txt").write_text("short")
    assert_refused(run(*texted, tmp_path / "short.txt"), "5 bytes", "at least 12,288")
    assert fingerprint(target) == before
    loaded = ["generate", target, "--load-state", target / "reader.state", "--max-new-tokens", "3"]
    assert run(*loaded).code == 0
    assert_refused(run("train", "--output-dir", target, "--resume"), "text")


def assert_effects(found: dict) -> None:
    """What each paper says, outside its noise."""
    collapse, bounded, trained = found["collapse"], found["bound"], found["train"]
    assert collapse["verdict"].startswith("collapse") and collapse["policy"] != "none"
    assert collapse["before"] > 2 * collapse["inside"]
    assert collapse["after"] < 1.3 * collapse["inside"]
    full, short, tova = (
        bounded[policy] for policy in ("none", "context:length=32", "tova:budget=32")
    )
    assert full["bytes"] > 10 * tova["bytes"]
    assert tova["interval"][1] < short["interval"][0] / 2
    assert trained["bits_per_byte"] < 5 and trained["loop_seconds"] > 3 * trained["seconds"]
    assert found["read"]["bytes"] * 1000 < found["read"]["cache"]
    recall = found["recall"]
    assert recall["apart"] < 1e-3 and recall["bytes"][1] > 2 * recall["bytes"][0]
    # 1,920 answers each: two standard errors of a difference are at most 0.032.
    assert recall["expanded"]["30"] > recall["same"]["30"] + 0.035


@pytest.mark.parametrize("width", [60, 100])
def test_quickstart_fits_the_terminal(width: int, monkeypatch) -> None:
    from rich.console import Console

    from statewright.cli.quickstart.screen import Screen

    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=width, record=True, file=io.StringIO())
    screen = Screen(console)
    screen.step("bound", "a Transformer's memory (Transformers are Multi-State RNNs)")
    screen.say("[bold]word[/bold] " * 40)
    screen.table(["memory", "nats per byte", "worse by"], [["window:budget=32:sinks=4", "1", "2"]])
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("window:budget=32:sinks=4" in line for line in lines)


def test_quickstart_stops_at_ctrl_c(tmp_path: Path, run, monkeypatch) -> None:
    def press(bar, event: dict) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.TrainingBar, "__call__", press)
    for step in ("collapse", "bound"):
        module = importlib.import_module(f"statewright.cli.quickstart.{step}")
        monkeypatch.setattr(module, step, lambda *args: {})
    ran = run("quickstart", "--output-dir", tmp_path / "q")
    assert ran.code == 130 and ran.err.splitlines()[-1].startswith("statewright: interrupted")


def test_quickstart_keeps_out_of_foreign_directories(tmp_path: Path, run) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    argv = ["quickstart", "--output-dir", tmp_path, "--seconds", "1"]
    assert_refused(run(*argv), "not empty")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
