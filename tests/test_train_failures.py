"""Disks that fill up and processes that die, for real: what was complete stays, and is told."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_distributed import STEPS, in_two
from test_distributed import make_run as make_shared
from test_train import assert_same, make_run, one_thread  # noqa: F401

import statewright
from statewright.cli import cli, main
from statewright.train.checkpoint import checkpoints
from statewright.train.distributed import TrainingStopped

# Bytes: no weights can be written, or the weights but not the optimizer's twice as many.
FULL = {"weights": 6_000, "optimizer": 24_000}


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[Callable[[], None]]:
    """Yields what fills the disk: every write beyond `num_bytes` of a file fails from then on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full", FULL)
def test_a_full_disk_loses_nothing_that_was_complete(full: str, tmp_path: Path) -> None:
    with no_file_longer_than(FULL[full]) as fill:
        run = make_run(tmp_path, listen=lambda event: event["step"] == 7 and fill())
        with pytest.raises(OSError, match=r"checkpoint-9: not written .*File too large") as told:
            run.train()
    assert "\n" not in str(told.value) and "what was complete before is as it was" in str(
        told.value
    )
    assert [c.step for c in checkpoints(tmp_path)] == [3, 6]
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    resumed, whole = make_run(tmp_path), make_run(tmp_path / "whole")
    resumed.resume()
    assert resumed.step == 6
    resumed.train()
    whole.train()
    assert_same(resumed, whole)


def test_a_full_disk_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text(" ".join(topics.topics.values())[:20_000])
    words = ["train", "--text", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "run")]
    words += ["--hidden-size", "16", "--num-layers", "1", "--num-lanes", "2", "--length", "16"]
    with no_file_longer_than(FULL["weights"]) as fill:
        fill()
        assert main([*words, "--num-steps", "1"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("statewright: ") and "checkpoint-1: not written" in last
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_what_safetensors_says_of_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    """Its error is no OSError; a verb that saves a model may meet it."""
    weights = {"a": torch.zeros(FULL["weights"])}
    save = partial(save_file, weights, tmp_path / "weights.safetensors")
    monkeypatch.setattr(cli, "main", lambda *args, **options: save())
    with no_file_longer_than(FULL["weights"]) as fill:
        fill()
        assert main(["list"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error, error


@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_stops_both(rank: int, tmp_path: Path) -> None:
    """Process 0 writes weights, process 1 its lanes' states alone."""

    def work(root: Path) -> None:
        with no_file_longer_than(1_000) as fill:

            def listen(event: dict) -> None:
                if event["step"] == 4 and dist.get_rank() == rank:
                    fill()

            run = make_shared(root / "run", save_every=3)
            run.listen = listen
            step = run._one_step
            run._one_step = lambda: (step(), listen({"step": run.step}))
            try:
                run.train()
            except (TrainingStopped, OSError) as stop:
                (root / f"told-{dist.get_rank()}").write_text(str(stop)[:150])
                os._exit(3)

    ends = in_two(work, tmp_path)
    assert ends == [3, 3]
    other = (tmp_path / f"told-{1 - rank}").read_text()
    assert f"process {rank} of 2 failed" in other
    assert [c.step for c in checkpoints(tmp_path / "run")] == [3]
    run = make_shared(tmp_path / "run")
    run.resume()
    run.train()
    assert run.step == STEPS


def _rank_of(launcher: int, rank: int) -> int:
    """The process that torchrun started as this rank."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher and f"\0RANK={rank}\0" in (entry / "environ").read_text():
                    return int(entry.name)
            except (OSError, ValueError, IndexError):
                continue
        time.sleep(0.2)
    raise AssertionError(f"torchrun started no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_torchrun_ends_with_a_rank_and_goes_on_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(topics.topics.values())[:60_000])
    run = tmp_path / "run"
    words = ["train", "--text", str(tmp_path / "text.txt"), "--output-dir", str(run)]
    words += ["--hidden-size", "16", "--num-layers", "1", "--num-lanes", "4", "--length", "16"]
    words += ["--num-steps", "100000", "--save-every", "5", "--eval-every", "100000"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "29517", "-m", "statewright"]
    with subprocess.Popen([*launch, *words], stderr=subprocess.PIPE, text=True) as torchrun:
        deadline = time.monotonic() + 240
        while not checkpoints(run):
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(_rank_of(torchrun.pid, 1), signal.SIGKILL)
        torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0
    found = checkpoints(run)[-1]
    assert found.step % 5 == 0 and found.record["num_processes"] == 2
    record = json.loads((found.path / "run.json").read_text())
    record["config"]["num_steps"] = found.step + 3
    (found.path / "run.json").write_text(json.dumps(record))
    assert main(["train", "--output-dir", str(run), "--resume"]) == 0
    assert statewright.load(run).config.num_hidden_layers == 1
    assert checkpoints(run)[-1].step == found.step + 3
