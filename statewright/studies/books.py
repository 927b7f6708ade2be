"""Bounded Transformers on whole books: the tables of arXiv:2401.06104 for a model one has.

Every cell's key starts with its table: `moby` (one window, all policies and budgets), `windows`
(a few policies, many windows), `long` (positions), `decode` (memory and time), `throughput`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from statewright.evaluation import ShortContext, build_bound, losses_into, short_context_losses
from statewright.evaluation.decoding import decode
from statewright.hf.bounded import BoundedCache
from statewright.hf.sizing import bounded_sizes
from statewright.policies import Eviction
from statewright.studies.cells import Cell
from statewright.studies.survivors import Survivors, classes_of

ROWS = {
    "Baseline": "context:length={}",
    "Window": "window:budget={}",
    "Window+1": "window:budget={}:sinks=1",
    "Window+4": "window:budget={}:sinks=4",
    "H2O-head": "h2o:budget={}",
    "H2O-layer": "h2o:budget={}:per=layer",
    "TOVA-head": "tova:budget={}:per=head",
    "TOVA-layer": "tova:budget={}",
    "TOVA-layer+4": "tova:budget={}:sinks=4",
    "Random": "random:budget={}",
}
FEW = ("Window+4", "H2O-head", "TOVA-layer")
MODES = ("original", "renumbered", "compressed")
_PIECE = 128
_SEGMENT = 2048


@dataclass(frozen=True)
class Plan:
    """What is run: sizes in tokens. The first `offset` tokens of a book are left out (contents)."""

    length: int = 4096
    budgets: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    few_budgets: tuple[int, ...] = (128, 512, 2048)
    windows: int = 3
    offset: int = 8192
    seed: int = 1
    long_length: int = 32768
    long_budget: int = 512
    new_tokens: int = 4000
    every: int = 250
    memory: int = 512 * 2**20


@dataclass(frozen=True)
class Book:
    """A text as token ids (T,), with the class of each token for the survivors."""

    name: str
    ids: Tensor
    classes: tuple[str, ...]

    @classmethod
    def read(cls, name: str, text: str, tokenizer: Any) -> Book:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return cls(name, torch.tensor(ids), tuple(classes_of(ids, tokenizer)))


def cells(
    model: PreTrainedModel, books: Sequence[Book], plan: Plan, tables: Sequence[str]
) -> Iterator[Cell]:
    """The cells of the tables asked for; the first book is the one of the single-book tables."""
    makers = {
        "moby": partial(_single_book, model, books[0], plan),
        "windows": partial(_many_windows, model, books, plan),
        "long": partial(_long, model, books[0], plan),
        "decode": partial(_decode, model, books[0], plan),
        "throughput": partial(_throughput, model, plan),
    }
    for table in tables:
        if table not in makers:
            raise ValueError(f"unknown table {table!r} (known: {', '.join(makers)})")
    for table in tables:
        yield from makers[table]()


def _single_book(model: PreTrainedModel, book: Book, plan: Plan) -> Iterator[Cell]:
    begin, end = plan.offset, plan.offset + plan.length
    ids, classes = _cut(book, begin, end), book.classes[begin:end]
    specs = ["none", *(row.format(k) for k in plan.budgets for row in ROWS.values())]
    for spec in specs:
        run = partial(window_cell, model, ids, spec, classes)
        yield Cell(f"moby/{book.name}/{begin}+{plan.length}/{spec}", run)


def _many_windows(model: PreTrainedModel, books: Sequence[Book], plan: Plan) -> Iterator[Cell]:
    specs = ["none", *(ROWS[name].format(k) for k in plan.few_budgets for name in FEW)]
    drawn = [(book, _starts(book, plan)) for book in books]
    for spec in specs:
        for book, starts in drawn:
            ids = torch.cat([_cut(book, s, s + plan.length) for s in starts])
            key = f"windows/{book.name}/{plan.windows}x{plan.length}/seed={plan.seed}/{spec}"
            yield Cell(key, partial(window_cell, model, ids, spec))


def _starts(book: Book, plan: Plan) -> list[int]:
    """Non-overlapping windows: one drawn in each of as many equal parts of the book."""
    part = (len(book.ids) - plan.offset) // plan.windows
    if part < plan.length:
        raise ValueError(f"{book.name}: too short for {plan.windows} windows of {plan.length}")
    generator = torch.Generator().manual_seed(plan.seed)
    places = torch.randint(part - plan.length + 1, (plan.windows,), generator=generator)
    return [plan.offset + i * part + int(p) for i, p in enumerate(places)]


def _cut(book: Book, begin: int, end: int) -> Tensor:
    if end > len(book.ids):
        raise ValueError(f"{book.name}: {len(book.ids)} tokens, expected at least {end}")
    return book.ids[begin:end].unsqueeze(0)


def window_cell(
    model: PreTrainedModel, ids: Tensor, spec: str, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Mean nats of each row of ids (B, T), and in runs of 256 tokens; who survived, if asked for.

    The survivors are those of the first row; classes: that of each of its tokens.
    """
    bound = build_bound(spec)
    found: dict[str, Any] = {}
    if isinstance(bound, ShortContext):
        losses = short_context_losses(model, ids, bound.length)
    elif bound is None:
        losses = torch.cat(list(losses_into(model, ids, DynamicCache(config=model.config), 512)), 1)
    else:
        assert isinstance(bound, Eviction)
        cache = BoundedCache(model, bound)
        survivors, pieces = Survivors(ids.shape[1], bound.budget, _PIECE), []
        for piece in losses_into(model, ids, cache, _PIECE):
            pieces.append(piece)
            survivors.look(cache.states)
        losses = torch.cat(pieces, 1)
        if classes:
            found["survivors"] = survivors.summary(classes)
    losses = losses.double()
    blocks = [float(part.mean()) for part in losses[0].split(256)]
    return {
        "tokens": losses.numel(),
        "nats": [round(float(row.mean()), 6) for row in losses],
        "block_nats": [round(value, 5) for value in blocks],
        **found,
    }


def _long(model: PreTrainedModel, book: Book, plan: Plan) -> Iterator[Cell]:
    ids = _cut(book, plan.offset, plan.offset + plan.long_length)
    k = plan.long_budget
    head = f"long/{book.name}/{plan.offset}+{plan.long_length}"
    for mode in MODES:
        for name in ("Window+4", "TOVA-layer"):
            spec = ROWS[name].format(k)
            yield Cell(f"{head}/{mode}/{spec}", partial(long_cell, model, ids, spec, mode))
    spec = f"context:length={k}"
    yield Cell(f"{head}/original/{spec}", partial(long_cell, model, ids, spec, "original"))


def long_cell(model: PreTrainedModel, ids: Tensor, spec: str, mode: str) -> dict[str, Any]:
    """Mean nats in runs of 2,048 tokens of a text (1, T) far longer than the training texts."""
    bound = build_bound(spec)
    if isinstance(bound, ShortContext):
        losses = short_context_losses(model, ids, bound.length)
    else:
        cache = BoundedCache(model, bound, positions=mode)
        losses = torch.cat(list(losses_into(model, ids, cache, 512)), 1)
    losses = losses.double()
    runs = [round(float(part.mean()), 5) for part in losses[0].split(_SEGMENT)]
    return {"tokens": losses.numel(), "nats": [round(float(losses.mean()), 6)], "runs": runs}


def _decode(model: PreTrainedModel, book: Book, plan: Plan) -> Iterator[Cell]:
    spec = ROWS["TOVA-layer"].format(plan.long_budget)
    ids = _cut(book, plan.offset, plan.offset + plan.long_budget)
    run = partial(decode_cell, model, ids, spec, plan.new_tokens, plan.every)
    yield Cell(f"decode/{book.name}/{plan.new_tokens}/{spec}", run)


def decode_cell(
    model: PreTrainedModel, ids: Tensor, spec: str, new_tokens: int, every: int
) -> dict[str, Any]:
    """The bounded and the unbounded cache in turns, so that a busy machine is fair to both."""
    points: dict[str, list] = {spec: [], "none": []}
    runs = {name: decode(model, ids, name, new_tokens, every) for name in points}
    for pair in zip(*runs.values(), strict=True):
        for name, point in zip(runs, pair):
            milliseconds = round(point.seconds_per_token * 1e3, 3)
            points[name].append([point.tokens, milliseconds, point.cache_bytes])
    return {"points": points, "units": ["tokens seen", "ms per token", "bytes"]}


def _throughput(model: PreTrainedModel, plan: Plan) -> Iterator[Cell]:
    budgets = [k for k in (*plan.budgets, plan.length) if k >= 256 or k == plan.length]
    specs = {k: ROWS["TOVA-layer"].format(k) for k in budgets if k < plan.length}
    sizes = bounded_sizes(model.config, list(specs.values()), plan.length, model.dtype)
    for k in budgets:
        row = sizes.bounded[specs[k]] if k in specs else sizes.full
        key = f"throughput/{plan.memory}/{specs.get(k, 'none')}/{k}"
        batch = max(plan.memory // row, 1)
        run = partial(throughput_cell, model, k, specs.get(k), batch, row)
        yield Cell(key, run)


def throughput_cell(
    model: PreTrainedModel, size: int, spec: str | None, batch: int, row_bytes: int
) -> dict[str, Any]:
    """Tokens per second of `batch` rows whose states are full with `size` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, size), generator=generator)
    point = list(decode(model, ids, spec, num_tokens=24, every=8))[-1]
    return {
        "batch": batch,
        "row_bytes": row_bytes,
        "held_bytes": point.cache_bytes,
        "tokens_per_second": round(batch / point.seconds_per_token, 3),
    }


def mean_nats(found: Mapping[str, Any]) -> float:
    """Over a cell's rows."""
    return sum(found["nats"]) / len(found["nats"])
