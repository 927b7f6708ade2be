"""The training-cost study: its loops are the cells, its ratios are of its times."""

from __future__ import annotations

import pytest
import torch

from statewright import laws
from statewright.mixers import GRU, LSTM
from statewright.studies import train_cost
from statewright.studies.experiment import Place
from statewright.studies.settings import TrainCostSettings

CPU = torch.device("cpu")


def test_loops_are_the_fused_kernels() -> None:
    for loop, fused in ((train_cost.LoopGRU, GRU), (train_cost.LoopLSTM, LSTM)):
        torch.manual_seed(0)
        a, b = loop(6).double(), fused(6).double()
        b.load_state_dict(a.state_dict())
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        assert laws.error(a(x)[0], b(x)[0]) < 1e-12


def test_train_cost(tmp_path) -> None:
    settings = TrainCostSettings(
        batch_size=2, hidden_size=8, repeats=1, shortest=4, longest=8, num_layers=2
    )
    chosen = ["mingru", "gru", "gru-loop", "mingru-log", "mamba"]
    seen = []
    cells = train_cost.cells(settings, chosen, (), Place(tmp_path, CPU, seen.append))
    assert [cell.key for cell in cells] == ["time/4", "time/8", *(f"memory/{c}" for c in chosen)]
    found = {"cells": {cell.key: cell.run() for cell in cells[:2]}}
    assert set(found["cells"]["time/8"]["times"]) == set(chosen)
    ratios = train_cost.ratios(found)
    times = found["cells"]["time/4"]["times"]
    assert ratios["gru-loop / mingru"][4] == times["gru-loop"]["best"] / times["mingru"]["best"]
    assert set(ratios) == {f"{c} / mingru" for c in chosen[1:]}
    assert [row["slower by"] for row in train_cost.table(found)] == list(ratios)
    assert "Python loops" in train_cost.NOTE and len(seen) == 2
    loop = train_cost.build("gru-loop", settings, CPU)
    assert all(isinstance(b.mixer, train_cost.LoopGRU) for b in loop.model.layers)


@pytest.mark.slow
def test_peak_memory_grows_with_length() -> None:
    settings = TrainCostSettings(batch_size=64, longest=512, shortest=128)
    peaks = train_cost.measure_memory(settings, "mingru", CPU)
    assert peaks["512"] > peaks["256"] > peaks["128"] > 0
    # The hidden states of the longest alone: 64 x 512 x 64 float32.
    assert peaks["512"] > 8 * 2**20
