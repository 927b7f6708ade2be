"""The State type: names, sizes, rows, joining, resizing, conversion, and that nothing aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.utils._pytree as pytree

from statewright.state import KVState, MatrixState, ModelState, State, VectorState, cat

B = 3


def vector(batch: int = B, channels: int = 4, taps: bool = True) -> VectorState:
    state = VectorState(h=torch.randn(batch, channels), seen=torch.arange(batch))
    if not taps:
        return state
    return state.with_extra("taps", torch.randn(batch, 2, channels), "batch tap channel")


def matrix(batch: int = B) -> MatrixState:
    return MatrixState(S=torch.randn(batch, 2, 3, 5), seen=torch.arange(batch))


def rows_of_keys(batch: int = B) -> KVState:
    k, v = torch.randn(2, batch, 2, 7, 3).unbind(0)
    pos = torch.arange(7).expand(batch, 2, 7)
    return KVState(k=k, v=v, pos=pos, seen=torch.full((batch,), 7))


def nested(batch: int = B) -> ModelState:
    layers = (vector(batch), (matrix(batch), rows_of_keys(batch)))
    return ModelState(layers=layers, seen=torch.arange(batch))


KINDS = [vector, matrix, rows_of_keys, nested]
kinds = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)


def same(a: State, b: State) -> bool:
    pairs = zip(a.items(), b.items(), strict=True)
    return all(n == m and torch.equal(s, t) and s.dtype == t.dtype for (n, s), (m, t) in pairs)


def storages(state: State) -> set[int]:
    return {t.untyped_storage().data_ptr() for _, t in state.items()}


def test_names_and_axes_reach_into_nested_layers() -> None:
    found = {name: axes for name, _, axes in nested().named()}
    assert found == {
        "seen": ("batch",),
        "layers.0.seen": ("batch",),
        "layers.0.extra.taps": ("batch", "tap", "channel"),
        "layers.0.h": ("batch", "channel"),
        "layers.1.0.seen": ("batch",),
        "layers.1.0.S": ("batch", "head", "key", "value"),
        "layers.1.1.seen": ("batch",),
        "layers.1.1.k": ("batch", "head", "slot", "key"),
        "layers.1.1.v": ("batch", "head", "slot", "value"),
        "layers.1.1.pos": ("batch", "head", "slot"),
    }
    assert [n for n, _ in nested().items()] == list(found)


@kinds
def test_axes_name_every_dimension(make: Callable) -> None:
    for name, tensor, names in make().named():
        assert len(names) == tensor.dim() and names[0] == "batch", name


def test_sizes_are_measured() -> None:
    state = vector()
    assert state.numel == 3 + 3 * 4 + 3 * 2 * 4
    assert state.nbytes == 3 * 8 + 3 * 4 * 4 + 3 * 2 * 4 * 4
    assert state.to(torch.float64).nbytes == 3 * 8 + 3 * 4 * 8 + 3 * 2 * 4 * 8
    assert nested().nbytes == sum(s.nbytes for s in (vector(), matrix(), rows_of_keys())) + B * 8
    assert state.batch_size == 3 and f"{state.nbytes:,} bytes" in repr(state)


@kinds
@pytest.mark.parametrize(
    ("index", "picked"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        (slice(0, 0), []),
        ([2, 0, 2], [2, 0, 2]),
        ([], []),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor(1), [1]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_rows_selects_in_order(make: Callable, index, picked: list[int]) -> None:
    state = make()
    chosen = state.rows(index)
    assert chosen.batch_size == len(picked)
    for (name, got), (_, whole) in zip(chosen.items(), state.items(), strict=True):
        assert torch.equal(got, whole[picked]), name


@kinds
@pytest.mark.parametrize(
    "index", [3, -4, [0, 7], torch.tensor([3]), torch.tensor([True, False]), torch.tensor([0.5])]
)
def test_rows_refuses_what_is_not_there(make: Callable, index) -> None:
    with pytest.raises(ValueError, match="rows: index"):
        make().rows(index)


@kinds
@pytest.mark.parametrize("index", [slice(None), [0, 1, 2], torch.ones(3, dtype=torch.bool)])
def test_rows_are_fresh_tensors(make: Callable, index) -> None:
    state = make()
    copy = state.rows(index)
    assert same(copy, state)
    assert not storages(copy) & storages(state)


@kinds
def test_where_takes_row_by_row(make: Callable) -> None:
    a, b = make(), make()
    mixed = a.where(torch.tensor([True, False, True]), b)
    assert same(mixed.rows([0, 2]), a.rows([0, 2])) and same(mixed.rows(1), b.rows(1))


@kinds
def test_cat_undoes_rows(make: Callable) -> None:
    state = make()
    joined = cat([state.rows(0), state.rows(slice(1, 3))])
    assert same(joined, state) and not storages(joined) & storages(state)


@pytest.mark.parametrize(
    "states",
    [
        [],
        [vector(), matrix()],
        [vector(), vector(taps=False)],
        [vector(), vector(channels=5)],
        [nested(), replace(nested(), layers=(vector(),))],
    ],
    ids=["none", "types", "extras", "sizes", "layers"],
)
def test_cat_refuses_states_that_differ(states: list) -> None:
    with pytest.raises(ValueError, match="cat"):
        cat(states)


def test_the_order_of_extras_is_no_difference() -> None:
    """A state read from a file may hold the same extras in another order."""
    a = vector(taps=False).with_extra("p", torch.ones(B, 1), "batch one")
    a = a.with_extra("c", torch.zeros(B, 2), "batch two")
    b = vector(taps=False).with_extra("c", torch.zeros(B, 2), "batch two")
    b = b.with_extra("p", torch.ones(B, 1), "batch one")
    both = cat([a, b])
    assert both.extra["p"].shape == (2 * B, 1) and both.extra["c"].shape == (2 * B, 2)
    assert torch.equal(a.where(torch.zeros(B, dtype=torch.bool), b).h, b.h)


def test_resize_grows_with_zeros_and_cuts_back() -> None:
    state = nested()
    grown = state.resize(key=8, channel=6)
    shapes = {name: tuple(t.shape) for name, t in grown.items()}
    assert shapes["layers.0.h"] == (3, 6) and shapes["layers.0.extra.taps"] == (3, 2, 6)
    assert shapes["layers.1.0.S"] == (3, 2, 8, 5) and shapes["layers.1.1.k"] == (3, 2, 7, 8)
    assert shapes["layers.1.1.v"] == (3, 2, 7, 3)
    assert grown.layers[1][0].S[:, :, 3:].count_nonzero() == 0
    assert same(grown.resize(channel=4).layers[0], state.layers[0])
    matrices = state.layers[1][0]
    assert same(matrices.resize(key=8, value=9).resize(key=3, value=5), matrices)
    assert matrices.resize(value=9).S.shape == (3, 2, 3, 9)
    assert torch.equal(matrices.resize(key=2).S, matrices.S[:, :, :2])


def test_resize_refuses_unknown_axes_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"no axis 'kee'.*\['channel', 'tap'\]"):
        vector().resize(kee=4)
    with pytest.raises(ValueError, match="no axis 'batch'"):
        vector().resize(batch=9)
    with pytest.raises(ValueError, match=">= 0"):
        vector().resize(channel=-1)


@kinds
def test_to_converts_floats_only(make: Callable) -> None:
    state = make()
    for (name, before), (_, after) in zip(state.items(), state.to(torch.bfloat16).items()):
        floating = before.is_floating_point()
        assert after.dtype == (torch.bfloat16 if floating else torch.int64), name
        assert torch.equal(after, before.to(after.dtype))
    assert same(state.to("cpu"), state)
    assert state.to("meta", torch.float64).batch_size == B


@kinds
def test_detach_cuts_and_map_keeps_the_structure(make: Callable) -> None:
    leaf = torch.tensor(1.0, requires_grad=True)
    tracked = make().map(lambda t: t * leaf if t.is_floating_point() else t)
    assert any(t.requires_grad for _, t in tracked.items())
    cut = tracked.detach()
    assert not any(t.requires_grad for _, t in cut.items())
    assert same(cut, tracked) and type(cut) is type(tracked)
    assert [n for _, _, n in cut.named()] == [n for _, _, n in tracked.named()]


@kinds
def test_states_are_frozen_and_compared_by_identity(make: Callable) -> None:
    state = make()
    with pytest.raises(FrozenInstanceError):
        state.seen = torch.zeros(B)
    assert state == state and state != state.map(torch.clone)
    assert len({state, state.map(torch.clone)}) == 2


def test_extras_are_added_to_a_copy() -> None:
    state = vector(taps=False)
    more = state.with_extra("c", torch.zeros(B, 4), "batch channel")
    assert state.extra == {} and state.extra_axes == {}
    less = more.without_extra("c")
    assert same(less, state) and less.extra_axes == {} and "c" in more.extra


@kinds
def test_pytree_round_trip_with_paths(make: Callable) -> None:
    state = make()
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == len(list(state.items()))
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert same(rebuilt, state) and type(rebuilt) is type(state)
    assert [n for _, _, n in rebuilt.named()] == [n for _, _, n in state.named()]
    paths, _ = pytree.tree_flatten_with_path(state)
    by_identity = {id(t): name for name, t in state.items()}
    for path, leaf in paths:
        where = pytree.keystr(path).replace("['", ".").replace("']", "")
        where = where.replace("[", ".").replace("]", "").lstrip(".")
        assert where == by_identity[id(leaf)]


def test_pytree_sees_axes_as_structure() -> None:
    a, b = (
        vector(taps=False).with_extra("c", torch.zeros(B, 4), n) for n in ("batch x", "batch y")
    )
    assert pytree.tree_structure(a) != pytree.tree_structure(b)
    assert pytree.tree_structure(a) == pytree.tree_structure(a.map(torch.clone))
