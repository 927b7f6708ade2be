"""What outlives a process: after a kill, a full disk or an exit all is continued exactly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_session import MODELS, fed, text
from test_session import assert_same as assert_same_session
from test_train import Stop, assert_same, make_model, make_run, one_thread, stop_at  # noqa: F401

import statewright
from statewright.session import Session
from statewright.train import checkpoint as saving
from statewright.train.checkpoint import checkpoints, read_tensors
from statewright.train.loop import Run

STEPS = 120


class Nursery:
    """A process that has imported everything, and forks a training run whenever it is asked.

    It runs no operation itself, so that there are no threads when it forks. The test kills the
    child, never the nursery.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def start(self, directory: Path, num_steps: int) -> int:
        self.process.stdin.write(f"{num_steps} {directory}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """How the child ended: 0, or minus the signal."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def nursery() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        num_steps, _, directory = line.strip().partition(" ")
        child = os.fork()
        if child == 0:
            os._exit(train(Path(directory), int(num_steps)))
        report(child)
        report(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def report(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def train(directory: Path, num_steps: int) -> int:
    run = killable(directory, num_steps)
    if checkpoints(directory):
        run.resume()
    run.train()
    return 0


def killable(directory: Path, num_steps: int) -> Run:
    """A checkpoint at every step, so that most kills fall into a save."""
    return make_run(directory, num_steps=num_steps, save_every=1, eval_every=7)


@contextmanager
def running() -> Iterator[Nursery]:
    process = Nursery()
    try:
        yield process
    finally:
        process.close()


def kill_once(process: Nursery, directory: Path, delay: float, num_steps: int) -> bool:
    """Start or resume the run and kill it `delay` seconds after its first step; False if done."""
    log = directory / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    child = process.start(directory, num_steps)
    deadline = time.monotonic() + 60
    while not log.exists() or log.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "the child never began"
        if (directory / "config.json").exists():
            break
        time.sleep(0.002)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return process.wait() != 0


def assert_all_whole(directory: Path) -> None:
    """Whatever is called a checkpoint can be loaded and resumed."""
    for path in directory.glob("checkpoint-*"):
        statewright.load(path)
    for found in checkpoints(directory):
        run = killable(directory, STEPS)
        found.restore(run.model, run.optimizer)
        assert found.carried(run.state).batch_size == 3
        assert read_tensors(found.path / "optimizer.safetensors")
    assert len(list(directory.glob("checkpoint-*"))) == len(checkpoints(directory)) <= 3


def kill_many(root: Path, num_kills: int, num_steps: int, seed: int) -> None:
    """Kill at random moments until `num_kills` are done; then the end must be the same."""
    draw, kills, rounds = random.Random(seed), 0, 0
    with running() as process:
        process.start(root / "whole", num_steps)
        assert process.wait() == 0
        while kills < num_kills:
            directory, rounds = root / f"killed-{rounds}", rounds + 1
            while kills < num_kills and kill_once(process, directory, draw.random() / 5, num_steps):
                kills += 1
                assert_all_whole(directory)
            process.start(directory, num_steps)
            assert process.wait() == 0
            ends = []
            for end in (root / "whole", directory):
                run = killable(end, num_steps)
                run.resume()
                ends.append(run)
            assert ends[0].step == num_steps
            assert_same(*ends)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_many(tmp_path, num_kills=6, num_steps=50, seed=0)


@pytest.mark.slow
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    kill_many(tmp_path, num_kills=100, num_steps=400, seed=1)


def test_failing_saves_keep_what_was_there(tmp_path: Path, monkeypatch) -> None:
    """Disk full in the middle of a save: the last checkpoint stays, no litter."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path)
    run.listen = stop_at(8, how=lambda: monkeypatch.setattr(saving, "save_file", full))
    with pytest.raises(OSError, match="No space left"):
        run.train()
    assert [p.name for p in sorted(tmp_path.glob("*checkpoint*"))] == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    monkeypatch.undo()
    checkpoints(tmp_path)[-1].restore(make_model(), run.optimizer)


def test_saving_a_step_again_is_never_half_done(tmp_path: Path, monkeypatch) -> None:
    """Killed while the older checkpoint of the same step goes: what is named so is whole."""
    run = make_run(tmp_path, num_steps=2)
    run.train()

    def killed(path: Path, **kwargs: Any) -> None:
        if Path(path).exists():
            for file in sorted(Path(path).iterdir())[:3]:
                file.unlink()
            raise Stop

    run.last = None
    monkeypatch.setattr(saving.shutil, "rmtree", killed)
    with pytest.raises(Stop):
        run.save()
    monkeypatch.undo()
    for found in checkpoints(tmp_path):
        statewright.load(found.path)
        assert read_tensors(found.path / "optimizer.safetensors")


DAMAGES = {
    "model": "model.safetensors",
    "optimizer": "optimizer.safetensors",
    "state": "lanes.safetensors",
    "record": "run.json",
}


@pytest.mark.parametrize("name", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damaged_checkpoints_are_one_clear_line(name: str, damage: str, tmp_path: Path) -> None:
    make_run(tmp_path, num_steps=2).train()
    file = tmp_path / "checkpoint-2" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        file.write_text("{}")
    with pytest.raises(ValueError) as caught:
        make_run(tmp_path).resume()
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_model_cannot_resume(tmp_path: Path) -> None:
    make_run(tmp_path, num_steps=2).train()
    with pytest.raises(ValueError, match="weights do not fit"):
        make_run(tmp_path, "minlstm").resume()


_CONTINUE = """
import json, sys, torch
torch.set_num_threads(1)
import statewright
from statewright import Session
model, state, out = sys.argv[1:]
session = Session.load(state, statewright.load(model))
written = session.generate(12, seed=5).tolist()
session.feed(torch.arange(100).expand(2, -1))
session.save(out)
json.dump([written, session.seen, session.tokens_hash, session.reach], sys.stdout)
"""


def test_continues_in_a_new_process(tmp_path: Path) -> None:
    model = MODELS["hybrid"]
    model.save_pretrained(tmp_path / "model")
    session = fed(model, text(70, rows=2), [33], chunk=32)
    session.save(tmp_path / "a.state", about={"title": "War and Peace"})
    paths = [str(tmp_path / name) for name in ("model", "a.state", "b.state")]
    done = subprocess.run(
        [sys.executable, "-c", _CONTINUE, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    written, seen, hashed, reach = json.loads(done.stdout)
    assert session.generate(12, seed=5).tolist() == written
    session.feed(torch.arange(100).expand(2, -1))
    assert (session.seen, session.tokens_hash, 70) == (seen, hashed, reach)
    assert_same_session(Session.load(tmp_path / "b.state", model), session)


if __name__ == "__main__":
    nursery()
