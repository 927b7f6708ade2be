"""The rolling hash: of the tokens and their order, never of how they were split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewright.token_hash import RollingHash

many = settings(max_examples=80, deadline=None, derandomize=True)
_P, _Q, _BASE = 2**31 - 1, 2**31 - 19, 1_000_003


def draw(rows: int, length: int, seed: int = 0, top: int = 50_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, (rows, length))


def of(ids: np.ndarray, splits: tuple[int, ...] = ()) -> str:
    hashed = RollingHash(ids.shape[0])
    for piece in np.split(ids, sorted(splits), axis=1):
        hashed.update(piece)
    return hashed.text


def by_definition(row: list[int]) -> list[int]:
    """Horner in Python's own integers."""
    values = [0, 0]
    for token in row:
        values = [(v * _BASE + token + 1) % p for v, p in zip(values, (_P, _Q))]
    return values


@given(
    length=st.integers(0, 60),
    rows=st.integers(1, 3),
    splits=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 99),
)
@many
def test_splits_do_not_matter(length: int, rows: int, splits: list[int], seed: int) -> None:
    ids = draw(rows, length, seed)
    assert of(ids, tuple(splits)) == of(ids)


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 8192, 8193])
@pytest.mark.parametrize("top", [2, 2**31 - 1])
def test_equals_the_definition(length: int, top: int) -> None:
    ids = draw(2, length, top=top)
    ids[:, -1] = top - 1
    rows = [by_definition(row.tolist()) for row in ids]
    expected = [rows[r][i] for i in range(2) for r in range(2)]
    assert of(ids) == "-".join(f"{value:x}" for value in expected)
    assert of(ids, (1, 4095, 4096, 4097)) == of(ids)


@given(tokens=st.lists(st.integers(0, 300), min_size=2, max_size=20), data=st.data())
@many
def test_every_token_and_its_place_count(tokens: list[int], data: st.DataObject) -> None:
    ids = np.array([tokens])
    i = data.draw(st.integers(0, len(tokens) - 1))
    changed = ids.copy()
    changed[0, i] += 1
    swapped = ids[:, ::-1]
    assert of(changed) != of(ids)
    assert (of(swapped) == of(ids)) == (swapped.tolist() == ids.tolist())
    assert of(ids[:, :-1]) != of(ids)


def test_leading_zeros_count() -> None:
    assert len({of(np.zeros((1, n), dtype=np.int64)) for n in range(50)}) == 50


def test_continues_from_its_text() -> None:
    ids = draw(3, 500)
    first = RollingHash(3)
    first.update(ids[:, :123])
    again = RollingHash(3, first.text)
    again.update(ids[:, 123:])
    assert again.text == of(ids)


def test_copies_are_independent() -> None:
    ids = draw(2, 40)
    one = RollingHash(2)
    one.update(ids[:, :20])
    other = one.copy()
    kept = one.text
    other.update(ids[:, 20:])
    assert one.text == kept and other.text == of(ids)


def test_rows_are_independent() -> None:
    ids = draw(3, 77)
    alone = [of(ids[i : i + 1]).split("-") for i in range(3)]
    assert of(ids).split("-") == [alone[r][i] for i in range(2) for r in range(3)]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_dtypes_do_not_matter(dtype: type) -> None:
    ids = draw(1, 30)
    assert of(ids.astype(dtype)) == of(ids)
