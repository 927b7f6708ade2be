"""The training suite measures what it says. Speeds are not asserted here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from statewright.bench import training
from statewright.bench.training import Size

TINY = Size(hidden_size=32, num_layers=1, lanes=2, length=8, tokens=4096, steps=2)


def test_a_batch_that_lies_ready_costs_nothing_else(tmp_path) -> None:
    """Both trainings do whole steps; one of them reads a new batch for each."""
    corpus = training.token_file(TINY, tmp_path)
    assert isinstance(corpus.tokens, np.memmap) and corpus.starts[0] == 0
    read = training.run_of(TINY, tmp_path / "a", corpus)
    ready = training.run_of(TINY, tmp_path / "b", corpus)
    ready.lanes = training._Ready(ready.lanes.batch(0), TINY.lanes)
    losses: dict[str, list[float]] = {"read": [], "ready": []}
    for name, run in (("read", read), ("ready", ready)):
        run.listen = lambda event, name=name: losses[name].append(event["loss"])
        training._steps(run, TINY, tmp_path)()
    assert losses["read"][0] == losses["ready"][0] and losses["read"][1] != losses["ready"][1]
    assert read.step == ready.step == TINY.steps


@pytest.mark.parametrize("make", [training.data, training.passing])
def test_cases_run(make) -> None:
    case = make(TINY)
    assert case.floor in case.methods and "ours" in case.methods
    for method in case.methods.values():
        method()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built in")
def test_two_processes_take_the_step_of_one() -> None:
    before = torch.get_num_threads()
    case = training.processes(TINY)
    case.check()
    assert 0 <= case.errors["ours"] < 1e-5
    for method in case.methods.values():
        method()
    assert torch.get_num_threads() == before
