"""What the checks found: cells, a verdict for CI, plain words, JSON and Markdown."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statewright.checks.checks import CHECKS, LENGTH, Trial
from statewright.checks.runner import Unsupported
from statewright.models.any_model import opened
from statewright.precision import dtype_of

OK, WRONG, RAISES, UNSUPPORTED = "ok", "WRONG", "raises", "not supported"
REQUIRED = ("fold", "chunk", "fork", "save")
LIMIT = 1e-3
# Where rounding itself is a percent, less than this cannot be told from it.
LIMIT_HALF = 5e-2


@dataclass(frozen=True)
class Cell:
    """One check's outcome; `error` is a share of the error when the state is ignored."""

    verdict: str
    error: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        near = self.verdict == OK and (self.error or 0) > LIMIT / 10
        return f"{self.verdict} {self.error:.1g}" if near or self.verdict == WRONG else self.verdict


@dataclass(frozen=True)
class Report:
    """All cells of one model."""

    name: str
    model: str
    cells: dict[str, Cell]

    def failed(self, required: Iterable[str] = REQUIRED) -> list[str]:
        """The required checks that are not ok."""
        return [name for name in required if self.cells[name].verdict != OK]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an infinite error becomes the string "inf"."""
        cells = {name: asdict(cell) for name, cell in self.cells.items()}
        for cell in cells.values():
            if cell["error"] == float("inf"):
                cell["error"] = "inf"
        return {"name": self.name, "model": self.model, "checks": cells}


def check(
    model: nn.Module | str | Path, name: str | None = None, names: Sequence[str] = tuple(CHECKS)
) -> Report:
    """Run checks on the state of a causal LM, ours or transformers'; the model is left unchanged.

    model: the model, or a directory or id, read in float32. name: what the report calls it.
    names: of the checks (docs/check.md). `report.failed()` lists those that must be ok and are
    not. Raises ValueError for an unknown check, for a model that takes no cache, and if even the
    shortest useful input runs out of memory (saying what fits).

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> check(model, names=["fold", "chunk"]).failed(["fold", "chunk"])
    []
    """
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise ValueError(f"check: no check {unknown[0]!r} (known: {', '.join(CHECKS)})")
    name = name or (str(model) if isinstance(model, str | Path) else "model")
    net: nn.Module = opened(model)
    training = net.training
    try:
        trial = Trial(net)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _must_fit(trial)
            cells = {n: _cell(trial, n) for n in names}
    finally:
        net.train(training)
    return Report(name, trial.run.name, cells)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA says so by type, the CPU allocator by its message."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text


def _must_fit(trial: Trial) -> None:
    """Read the whole batch once; on running out of memory, find what fits and say it."""
    length = LENGTH
    while length:
        try:
            trial.run.read(trial.ids[:, :length])
            break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                return
        length //= 2
    if length < LENGTH:
        fits = f"{length} tokens fit" if length else "not even one token fits"
        raise ValueError(
            f"check: out of memory reading {trial.ids.shape[0]} rows of {LENGTH} tokens; {fits}"
        )


def _cell(trial: Trial, name: str) -> Cell:
    dtype = dtype_of(trial.model)
    limit = LIMIT if dtype in (torch.float32, torch.float64) else LIMIT_HALF
    try:
        error = CHECKS[name](trial)
    except Unsupported as reason:
        return Cell(UNSUPPORTED, note=str(reason))
    except Exception as raised:
        if is_out_of_memory(raised):
            raise ValueError(f"check: out of memory in {name!r}; try a smaller --dtype") from raised
        # Whatever a foreign model raises is the finding, not our failure.
        return Cell(RAISES, note=f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}")
    return Cell(OK if error <= limit else WRONG, error)


_SERVING = {
    "chunk": "do not prefill in chunks, continue a chat or reuse a prefix with several new tokens",
    "fold": "single-token decoding does not compute what the training forward computes",
    "positions": "always pass position_ids when continuing from a cache",
    "left": "do not batch prompts of different length, even padded on the left",
    "right": "do not pad on the right before continuing; pad on the left",
    "batch": "serve one row at a time",
    "beams": "do not use beam search",
    "shared": "copy the cache before using a prefix twice (it is changed in place)",
    "bf16": "bfloat16 loses more through the carried state than its rounding explains",
    "fork": "its state cannot be forked through Statewright",
    "save": "its state cannot be saved and restored",
    "session": "Statewright's Session cannot carry it",
    "kernel": "the fast kernels on this machine do not compute the reference",
}
_TRAINING = {
    "packed": "do not pack documents by position_ids: the state leaks from one to the next",
    "gradient": "gradients through a carried state are wrong or unavailable (no TBPTT)",
    "right": "right-padded batches are safe only if nothing is continued from them",
}


def words(report: Report) -> str:
    """One paragraph: what this means if you serve or train this model."""
    bad = {name for name, cell in report.cells.items() if cell.verdict in (WRONG, RAISES)}
    bad |= {"chunk"} if "chunks" in bad else set()
    serve = [text for name, text in _SERVING.items() if name in bad]
    train = [text for name, text in _TRAINING.items() if name in bad]
    silent = [n for n, cell in report.cells.items() if cell.verdict == WRONG]
    unsupported = [n for n, cell in report.cells.items() if cell.verdict == UNSUPPORTED]
    missing = [n for n in unsupported if n != "kernel"]
    found = f"silently wrong in {', '.join(silent)}" if silent else "nothing is silently wrong"
    parts = [f"{report.name} ({report.model}): {found}."]
    if serve:
        parts.append(f"If you serve it: {'; '.join(serve)}.")
    if train:
        parts.append(f"If you train it: {'; '.join(train)}.")
    if not serve and not train:
        parts.append("What was tried is safe to serve and to train with.")
    if missing:
        parts.append(f"Not offered by the model: {', '.join(missing)}.")
    return " ".join(parts)
