"""What training costs beside its arithmetic: data, state passing, a second process."""

from __future__ import annotations

import multiprocessing
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statewright.bench.protocol import Case, using_threads
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.train.config import TrainConfig
from statewright.train.data import Batch, Corpus
from statewright.train.loop import Run

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Size:
    """A Mamba-2 on bytes, `lanes` rows of `length` tokens a step, of a file of `tokens`."""

    hidden_size: int = 256
    num_layers: int = 4
    lanes: int = 8
    length: int = 256
    tokens: int = 1 << 25
    steps: int = 1


SMALL = Size(hidden_size=64, num_layers=1, lanes=4, length=64, tokens=1 << 18, steps=4)


def cases(quick: bool) -> Iterator[Case]:
    """Steps of the trainer, whole ones: gradients, the optimizer, the record."""
    size = SMALL if quick else Size()
    yield data(size)
    yield passing(size)
    if torch.distributed.is_gloo_available():
        yield processes(size)


def run_of(size: Size, root: Path, corpus: Corpus, **options: Any) -> Run:
    """A run that is never saved; its directory holds the record of its steps."""
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=257,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        mixer="mamba2:state_size=64:head_dim=64",
        conv_kernel=0,
        mlp_ratio=0.0,
    )
    model = StatewrightForCausalLM(config)
    train = TrainConfig(num_lanes=size.lanes, length=size.length, **options)
    root.mkdir(parents=True, exist_ok=True)
    return Run(model, byte_tokenizer(), corpus, None, train, root)


def token_file(size: Size, root: Path) -> Corpus:
    """Random bytes in documents of about 1,000, mapped from a file as `statewright data` writes."""
    generator = np.random.default_rng(0)
    path = root / "tokens"
    generator.integers(256, size=size.tokens, dtype=np.uint16).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    starts = np.unique(generator.integers(size.tokens, size=size.tokens // 1000))
    starts[0] = 0
    np.save(root / "starts.npy", starts.astype(np.int64))
    return Corpus(tokens, starts.astype(np.int64), size.tokens, "bench")


def data(size: Size) -> Case:
    """Against a batch that lies ready: what finding, cutting and labelling one costs."""
    held = _directory()
    root = Path(held.name)
    corpus = token_file(size, root)
    ready, reading = (run_of(size, root / name, corpus) for name in ("ready", "reading"))
    ready.lanes = _Ready(ready.lanes.batch(0), size.lanes)
    methods = {"floor: a batch that lies ready": _steps(ready, size, held)}
    methods["ours"] = _steps(reading, size, held)
    return Case(f"training step, data: {_named(size)}", "floor: a batch that lies ready", methods)


@dataclass(frozen=True)
class _Ready:
    """Batches of which every one is the same."""

    one: Batch
    num_lanes: int

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        return self.one.rows(rows)


def passing(size: Size) -> Case:
    """Where a row's state comes from, against beginning every row from an empty one."""
    held, floor = _directory(), "floor: from zero"
    root = Path(held.name)
    corpus = token_file(size, root)
    kinds = {floor: "zero", "ours": "previous", "ours, another's": "other", "ours, noise": "noise"}
    methods = {
        label: _steps(run_of(size, root / kind, corpus, initial=kind), size, held)
        for label, kind in kinds.items()
    }
    return Case(f"training step, state passing: {_named(size)}", floor, methods)


def processes(size: Size) -> Case:
    """Two processes of one thread on half of the rows each, against one of two threads."""
    held, floor = _directory(), "floor: one process, two threads"
    root = Path(held.name)
    alone, pair = run_of(size, root / "one", token_file(size, root)), Pair(size, root)
    losses: list[float] = []
    alone.listen = lambda event: losses.append(event["loss"])
    with using_threads(2):
        alone._one_step()
    error = abs(pair.step(1) / losses[0] - 1)
    one = _steps(alone, size, held)

    def with_two() -> None:
        with using_threads(2):
            one()

    methods: dict[str, Callable[[], Any]] = {floor: with_two}
    methods["ours"] = lambda: pair.step(size.steps)
    name = f"training step, two processes: {_named(size)}"
    return Case(name, floor, methods, {"ours": error}, {"ours": _TOLERANCE})


class Pair:
    """Two processes on gloo that take steps when told to, until they are forgotten."""

    def __init__(self, size: Size, root: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, children = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            child = context.Process(target=_rank, args=(rank, size, root, theirs), daemon=True)
            child.start()
            theirs.close()
            self._pipes.append(ours)
            children.append(child)
        weakref.finalize(self, _end, children)

    def step(self, count: int) -> float:
        """`count` steps of both; the last one's loss."""
        for pipe in self._pipes:
            pipe.send(count)
        try:
            losses = [pipe.recv() for pipe in self._pipes]
        except EOFError as error:
            raise RuntimeError("training: a process of the pair ended") from error
        return losses[0]


def _end(children: list[Any]) -> None:
    for child in children:
        child.terminate()
        child.join()


def _rank(rank: int, size: Size, root: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{root}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    tokens = np.memmap(root / "tokens", dtype=np.uint16, mode="r")
    corpus = Corpus(tokens, np.load(root / "starts.npy"), size.tokens, "bench")
    run, losses = run_of(size, root / f"rank{rank}", corpus), [0.0]
    run.listen = lambda event: losses.append(event["loss"])
    while True:
        try:
            count = pipe.recv()
        except EOFError:
            return
        for _ in range(count):
            run._one_step()
        pipe.send(losses[-1])


def _steps(run: Run, size: Size, held: Any) -> Callable[[], None]:
    """`held`: the directory in which the run lies."""

    def steps() -> None:
        assert held is not None
        for _ in range(size.steps):
            run._one_step()

    return steps


def _named(size: Size) -> str:
    return f"{size.num_layers} layers of {size.hidden_size}, {size.lanes} x {size.length} tokens"


def _directory() -> tempfile.TemporaryDirectory:
    """Deleted when nobody holds it any more."""
    return tempfile.TemporaryDirectory(prefix="statewright-bench-")
