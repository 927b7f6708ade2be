"""What every test shares: nothing reaches the network, and every test draws the same numbers."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two workers on two cores: a thread that waits would spin on the core that the other one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Small tensors gain nothing from threads, and two processes of two threads fight over two cores.
torch.set_num_threads(1)
# Imports and collected tests are half a million objects that stay: not to be searched for garbage.
gc.disable()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
