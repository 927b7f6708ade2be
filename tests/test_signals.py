"""What ends a job saves it: SIGTERM and SIGUSR1 as Ctrl-C, in one process and in two."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_distributed import STEPS, in_two
from test_distributed import make_run as make_shared
from test_train import assert_same, make_run, metrics, one_thread, stop_at, whole  # noqa: F401

import statewright
from statewright.train.checkpoint import checkpoints
from statewright.train.loop import TrainingInterrupted
from statewright.train.signals import SIGNALS


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, signum, tmp_path: Path) -> None:  # noqa: F811
    """At step 8, whose evaluation is due: it is made up for when the run goes on."""
    before = [signal.getsignal(s) for s in SIGNALS]
    how = stop_at(8, how=lambda: signal.raise_signal(signum))
    with pytest.raises(TrainingInterrupted, match="after step 8; saved") as caught:
        make_run(tmp_path, listen=how).train()
    assert caught.value.exit_code == 128 + signum
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert metrics(tmp_path)[-1]["event"] == "step", "an evaluation kept a scheduler waiting"
    run = make_run(tmp_path)
    run.resume()
    run.train()
    assert_same(run, whole["mingru"])


def test_a_repeated_sigterm_does_not_cut_the_save(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        make_run(tmp_path, listen=stop_at(5, how=twice)).train()
    assert checkpoints(tmp_path)[-1].step == 5


@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=str)
def test_one_process_of_two_gets_the_signal(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """Both stop after the same step with the same code, and one process goes on exactly."""

    def work(root: Path) -> None:
        run = make_shared(root / "run", save_every=1000)
        step = run._one_step

        def then_signal() -> None:
            step()
            if run.step == 7 and dist.get_rank() in ranks:
                os.kill(os.getpid(), signal.SIGTERM)

        run._one_step = then_signal
        try:
            run.train()
        except TrainingInterrupted as stop:
            os._exit(stop.exit_code)

    assert in_two(work, tmp_path) == [143, 143]
    assert [c.step for c in checkpoints(tmp_path / "run")] == [7]
    again, straight = make_shared(tmp_path / "run"), make_shared(tmp_path / "straight")
    again.resume()
    for run in (again, straight):
        run.train()
    assert again.step == straight.step == STEPS
    theirs = straight.model.state_dict()
    for name, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-9, atol=1e-9)
    assert statewright.load(tmp_path / "run").config.hidden_size == 16
