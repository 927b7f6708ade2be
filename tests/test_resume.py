"""One command begins a run, goes on with it, extends it, and leaves a finished one alone."""

# ruff: noqa: F811

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import SHORT, TEXT, TINY, assert_refused, run  # noqa: F401
from test_train_failures import _rank_of

from statewright.cli import progress
from statewright.train.checkpoint import checkpoints

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


def command(book: Path, out: Path, *more: object) -> list[object]:
    options = ["--schedule", "constant", "--num-warmup-steps", "2"]
    return ["train", "--text", book, "--output-dir", out, *TINY, *SHORT, *options, *more]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_the_same_command_begins_continues_extends_and_ends(
    book: Path,
    tmp_path: Path,
    run,
    monkeypatch,
) -> None:
    out, shown = tmp_path / "run", progress.TrainingBar.__call__

    def press(bar, event: dict) -> None:
        shown(bar, event)
        if event["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    auto = command(book, out, "--resume", "auto")
    monkeypatch.setattr(progress.TrainingBar, "__call__", press)
    begun = run(*auto)
    monkeypatch.undo()
    assert begun.code == 143 and [c.step for c in checkpoints(out)] == [4]
    assert run(*auto).code == 0 and len(losses(out)) == 6
    before = (out / NAME).read_bytes(), (out / "metrics.jsonl").read_bytes()
    finished = run(*auto)
    assert finished.code == 0 and "its 6 steps are done; a higher --num-steps" in finished.err
    assert ((out / NAME).read_bytes(), (out / "metrics.jsonl").read_bytes()) == before
    assert run(*auto, "--num-steps", "9", "--save-every", "2").code == 0
    assert run(*command(book, tmp_path / "whole", "--num-steps", "9")).code == 0
    assert losses(out) == losses(tmp_path / "whole")
    assert (out / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    # The run's own options stand in for those that are not given.
    assert run("train", "--output-dir", out, "--resume", "auto").code == 0
    assert len(losses(out)) == 9


def test_what_would_be_another_run_is_refused_with_both_values(
    book: Path,
    tmp_path: Path,
    run,
) -> None:
    out = tmp_path / "run"
    assert run(*command(book, out, "--resume", "auto")).code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other = {
        "--hidden-size": ("32", "16"),
        "--mixer": ("minlstm", "mingru"),
        "--tokenizer": ("characters", "bytes"),
        "--valid-share": ("0.2", "0.1"),
        "--seed": ("3", "0"),
        "--learning-rate": ("0.01", "0.001"),
        "--num-steps": ("5", "6"),
    }
    for option, (new, old) in other.items():
        told = f"{option} {new} (it has {old})"
        assert_refused(run(*command(book, out, "--resume", "auto", option, new)), told)
    both = ["--hidden-size", "32", "--dropout", "0.3"]
    told = "--dropout 0.3 (it has 0.1); --hidden-size 32 (it has 16)"
    assert_refused(run(*command(book, out, "--resume", "auto", *both)), told)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    refused = run(*command(tmp_path / "other.txt", out, "--resume", "auto"))
    assert_refused(refused, "was trained on other text")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    missing = run("train", "--output-dir", tmp_path / "none", "--resume", "auto")
    assert_refused(missing, "give at least one --text")


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_process_that_is_ended_goes_on_bit_for_bit(
    signum: int,
    book: Path,
    tmp_path: Path,
    run,
) -> None:
    out, more = tmp_path / "run", ["--num-steps", "400", "--eval-every", "400"]
    argv = [sys.executable, "-m", "statewright", *command(book, out, *more, "--resume", "auto")]
    with subprocess.Popen([*map(str, argv)], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signum)
        _, told = process.communicate(timeout=240)
    assert process.returncode == 128 + signum and "Traceback" not in told, told
    done = checkpoints(out)[-1].step
    assert 5 <= done < 400 and len(losses(out)) == done
    steps = ["--num-steps", str(done + 3)]
    # Constant from step 2 on: the run may be cut as well as extended without another step.
    record = out / f"checkpoint-{done}" / "run.json"
    record.write_text(record.read_text().replace('"num_steps": 400', f'"num_steps": {done + 3}'))
    assert run("train", "--output-dir", out, "--resume", "auto").code == 0
    assert run(*command(book, tmp_path / "whole", *more, *steps)).code == 0
    assert (out / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("who", ["torchrun", "rank 1"])
def test_torchrun_is_ended_and_goes_on(who: str, book: Path, tmp_path: Path, run) -> None:
    """SIGTERM of the launcher reaches both processes, that of one process only this one."""
    out = tmp_path / "run"
    whole = command(book, out, "--num-steps", "100000", "--eval-every", "100000")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "-m", "statewright", *map(str, whole)]
    with subprocess.Popen(
        [*launch, "--resume", "auto", "--save-every", "100000"], stderr=subprocess.PIPE, text=True
    ) as torchrun:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(torchrun.pid if who == "torchrun" else _rank_of(torchrun.pid, 1), signal.SIGTERM)
        _, told = torchrun.communicate(timeout=240)
    assert torchrun.returncode != 0 and "interrupted after step" in told, told
    (found,) = checkpoints(out)
    assert found.record["num_processes"] == 2 and len(losses(out)) == found.step >= 5
    record = json.loads((found.path / "run.json").read_text())
    record["config"]["num_steps"] = found.step + 2
    (found.path / "run.json").write_text(json.dumps(record))
    assert run("train", "--output-dir", out, "--resume", "auto").code == 0
    assert checkpoints(out)[-1].step == found.step + 2
