"""The cost of training against length, figure 1 of "Were RNNs All We Needed?" (arXiv:2410.01201).

The paper's 1,324 and 1,361 times (length 4,096, minGRU and minLSTM on a T4) are against GRU and
LSTM as loops over tokens in Python, not against the fused kernels that torch has; both are here.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from statewright import ops
from statewright.mixers import GRU, LSTM
from statewright.mixers.gru import NonlinearMixer
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.studies.cells import Cell
from statewright.studies.experiment import Place
from statewright.studies.settings import TrainCostSettings

NAME = "train-cost"
NOTE = (
    "The paper's 1,324x (minGRU) and 1,361x (minLSTM) at length 4,096 are against GRU and LSTM "
    "written as Python loops ('-loop' here), not against torch's fused kernels ('gru', 'lstm')."
)
_VOCAB = 16


class _Loop(NonlinearMixer):
    """The paper's baseline: one token after the other, in Python.

    The tokens are unbound once: to index them one by one makes the backward pass quadratic.
    """

    def fused(self, x: Tensor, hidden: tuple, weights: list[Tensor]) -> tuple[Tensor, tuple]:
        outputs = []
        for x_t in x.unbind(1):
            hidden = self.cell(x_t, hidden, weights)
            outputs.append(hidden[0])
        return torch.stack(outputs, 1), hidden


class LoopGRU(_Loop, GRU):
    """GRU's own equations, without torch's fused kernel."""


class LoopLSTM(_Loop, LSTM):
    """LSTM's own equations, without torch's fused kernel."""


# The mixer of each curve, and the scan it runs on: "log" is the paper's own parallel form.
CURVES: dict[str, tuple[str, str]] = {
    "mingru": ("mingru", "auto"),
    "minlstm": ("minlstm", "auto"),
    "mingru-log": ("mingru", "log"),
    "minlstm-log": ("minlstm", "log"),
    "mamba": ("mamba", "auto"),
    "gru-loop": ("gru", "auto"),
    "lstm-loop": ("lstm", "auto"),
    "gru": ("gru", "auto"),
    "lstm": ("lstm", "auto"),
}
_LOOPS = {"gru-loop": LoopGRU, "lstm-loop": LoopLSTM}
DEFAULT = tuple(CURVES)


def build(curve: str, settings: TrainCostSettings, device: torch.device) -> StatewrightForCausalLM:
    """Embedding, residual blocks of norm and mixer, head: the same for every curve."""
    if curve not in CURVES:
        raise ValueError(f"unknown system {curve!r} (known: {', '.join(CURVES)})")
    name, _ = CURVES[curve]
    spec = name if name == "mamba" else f"{name}:expansion={settings.expansion}"
    config = StatewrightConfig(
        vocab_size=_VOCAB,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        mixer=spec,
        conv_kernel=0,
        mlp_ratio=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StatewrightForCausalLM(config)
        if curve in _LOOPS:
            for block in model.model.layers:
                block.mixer = _LOOPS[curve](settings.hidden_size, settings.expansion)
    return model.to(device)


def once(curve: str, model: StatewrightForCausalLM, ids: Tensor) -> None:
    """Forward, loss at every token, backward."""
    backend = CURVES[curve][1]
    with nullcontext() if backend == "auto" else ops.default_backend(backend):
        logits = model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    model.zero_grad(set_to_none=True)


def _ids(settings: TrainCostSettings, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(_VOCAB, (settings.batch_size, length), generator=generator).to(device)


def cells(
    settings: TrainCostSettings,
    chosen: Sequence[str],
    seeds: Sequence[int],
    place: Place,
) -> list[Cell]:
    """`time/<length>`: every system in turns; `memory/<system>`: its peaks at all lengths."""
    for curve in chosen:
        build(curve, settings, torch.device("meta"))

    def timed(length: int) -> dict[str, Any]:
        found = measure_time(settings, chosen, length, place.device)
        place.listen({"key": f"time/{length}", **{n: v["best"] for n, v in found.items()}})
        return {"times": found}

    def peaks(curve: str) -> dict[str, Any]:
        found = measure_memory(settings, curve, place.device)
        place.listen({"key": f"memory/{curve}", **found})
        return {"peaks": found}

    return [
        *(Cell(f"time/{n}", lambda n=n: timed(n)) for n in settings.lengths),
        *(Cell(f"memory/{c}", lambda c=c: peaks(c)) for c in chosen),
    ]


def measure_time(
    settings: TrainCostSettings, chosen: Sequence[str], length: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds of one forward, loss and backward: all systems take turns, after a warm-up."""
    models = {curve: build(curve, settings, device) for curve in chosen}
    ids, times = _ids(settings, length, device), {curve: [] for curve in chosen}
    for i in range(settings.repeats + 1):
        for curve, model in models.items():
            gc.collect(0)
            with _clock(device) as seconds:
                once(curve, model, ids)
            if i:
                times[curve].append(seconds())
    return {c: {"best": min(t), "median": statistics.median(t)} for c, t in times.items()}


@contextmanager
def _clock(device: torch.device) -> Iterator[Callable[[], float]]:
    _wait(device)
    began, ended = time.perf_counter(), []
    yield lambda: ended[0] - began
    _wait(device)
    ended.append(time.perf_counter())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_memory(settings: TrainCostSettings, curve: str, device: torch.device) -> dict[str, int]:
    """Peak bytes over those of the model, at every length.

    On a CPU the process's own (Linux), in a fresh process that meets them in ascending order.
    """
    if device.type == "cuda":
        return {str(n): _cuda_peak(settings, curve, n, device) for n in settings.lengths}
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("train-cost: peak memory is measured on Linux and CUDA only")
    spawning = multiprocessing.get_context("spawn")
    with spawning.Pool(1) as pool:
        return pool.apply(_process_peaks, (settings, curve, torch.get_num_threads()))


def _cuda_peak(settings: TrainCostSettings, curve: str, length: int, device: torch.device) -> int:
    model, ids = build(curve, settings, device), _ids(settings, length, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    once(curve, model, ids)
    return torch.cuda.max_memory_allocated(device) - before


def _process_peaks(settings: TrainCostSettings, curve: str, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    model = build(curve, settings, device)
    once(curve, model, _ids(settings, 1, device))
    # Importing held more than the model does: forget that peak.
    Path("/proc/self/clear_refs").write_text("5")
    before, peaks = _held("VmRSS"), {}
    for length in settings.lengths:
        once(curve, model, _ids(settings, length, device))
        peaks[str(length)] = _held("VmHWM") - before
    return peaks


def _held(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since that was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def ratios(found: dict[str, Any]) -> dict[str, dict[int, float]]:
    """How many times slower than minGRU (GRU's curves, Mamba) or minLSTM (LSTM's) each is."""
    curves: dict[str, dict[int, float]] = {}
    for key, cell in found["cells"].items():
        if not key.startswith("time/"):
            continue
        times = {name: values["best"] for name, values in cell["times"].items()}
        for name, seconds in times.items():
            against = "minlstm" if "lstm" in name else "mingru"
            if against in times and name != against:
                length = int(key.split("/")[1])
                curves.setdefault(f"{name} / {against}", {})[length] = seconds / times[against]
    return curves


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per pair of systems: the ratio of their times at each length."""
    return [
        {"slower by": name, **{f"{n:,}": f"{curve[n]:.1f}x" for n in sorted(curve)}}
        for name, curve in ratios(found).items()
    ]
