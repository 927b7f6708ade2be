"""Sessions: read once, read again the same: after a fork, a rewind, or in a new process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import make_model, one_thread  # noqa: F401
from torch import Tensor

from statewright import history
from statewright.session import Session
from statewright.state_file import save_state

MIXERS = {
    "mingru": "mingru:expansion=1.5",
    "lstm": "lstm",
    "hybrid": ["minlstm", "lstm:expansion=2"],
}
MODELS = {name: make_model(mixer).eval() for name, mixer in MIXERS.items()}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
few = settings(max_examples=15, deadline=None, derandomize=True)


def text(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def fed(model: Any, ids: Tensor, splits: list[int], **options: Any) -> Session:
    session = Session(model, batch_size=ids.shape[0], **options)
    for piece in ids.tensor_split(sorted(splits), dim=1):
        if piece.shape[1]:
            session.feed(piece)
    return session


def assert_same(a: Session, b: Session) -> None:
    """Bit-identical, in everything there is."""
    assert (a.seen, a.tokens_hash, a.nbytes) == (b.seen, b.tokens_hash, b.nbytes)
    assert np.array_equal(a.last_ids, b.last_ids)
    assert (a.logits is None) == (b.logits is None)
    assert a.logits is None or torch.equal(a.logits, b.logits)
    for (name, x), (_, y) in zip(a.state.items(), b.state.items(), strict=True):
        assert torch.equal(x, y), name


def kept(session: Session) -> list[Tensor]:
    return [t.clone() for _, t in session.state.items()] + [session.logits.clone()]


@every_model
@given(splits=st.lists(st.integers(0, 30), max_size=5), chunk=st.sampled_from([1, 7, 1024]))
@few
def test_any_pieces_are_the_whole(model, splits: list[int], chunk: int) -> None:
    ids = text(30)
    whole = model(ids)
    session = fed(model, ids, splits, chunk=chunk)
    assert torch.allclose(session.logits, whole.logits[:, -1], atol=2e-5)
    for (name, x), (_, y) in zip(session.state.items(), whole.state.items(), strict=True):
        assert torch.allclose(x.double(), y.double(), atol=2e-5), name
    assert session.seen == 30 and session.tokens_hash == fed(model, ids, []).tokens_hash
    assert_same(session, fed(model, ids, splits, chunk=chunk))


def test_lists_and_long_feeds_are_cut_into_chunks() -> None:
    model, ids = MODELS["hybrid"], text(50)
    session = Session(model, chunk=16)
    assert torch.equal(session.feed(ids[0].tolist()), session.logits)
    assert_same(session, fed(model, ids, [16, 32, 48]))
    assert session.feed([]) is session.logits


@every_model
def test_forks_never_see_each_other(model) -> None:
    """Three generations of forks, each written to while the others are read back."""
    session = fed(model, text(30), [11], chunk=8)
    before = kept(session)
    forks = [session.fork(), session.fork(), session.fork().fork().fork()]
    for i, fork in enumerate(forks):
        fork.feed(text(9, seed=i + 1))
        fork.generate(3, seed=i)
    assert all(torch.equal(a, b) for a, b in zip(kept(session), before))
    for i, fork in enumerate(forks):
        alone = fed(model, text(30), [11], chunk=8)
        alone.feed(text(9, seed=i + 1))
        alone.generate(3, seed=i)
        assert_same(fork, alone)
        assert_same(fork.rewind(to=35), alone.rewind(to=35))
        assert_same(fork.rewind(to=21), session.fork().rewind(to=21))
    session.feed(text(5, seed=9))
    assert_same(forks[0], alone.rewind(to=21))
    assert_same(session.rewind(to=30), fed(model, text(30), [8, 11, 19, 27]))


@pytest.mark.parametrize("budget", [0, 4_000, 10**9], ids=["none", "some", "all"])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    moves=st.lists(st.tuples(st.sampled_from("frg"), st.floats(0, 1)), max_size=8),
)
@few
def test_any_history(budget: int, lengths: list[int], moves: list) -> None:
    """Feeds, forks, rewinds and writing in any order, against a session made afresh every time."""
    model = MODELS["hybrid"]
    session, pieces = Session(model, snapshot_bytes=budget), []
    for i, length in enumerate(lengths):
        pieces.append(text(length, seed=i))
        session.feed(pieces[-1])
    for i, (move, share) in enumerate(moves):
        if move == "f":
            other = session.fork()
            other.feed(text(3, seed=99))
            if share > 0.5:
                session, pieces = other, [*pieces, text(3, seed=99)]
        elif move == "g" and session.seen:
            pieces = pieces + [token[:, None] for token in session.stream(2, seed=i)]
        elif move == "r":
            to = session.reach + round(share * (session.seen - session.reach))
            session.rewind(to)
            pieces = cut(pieces, to)
        fresh = Session(model)
        for piece in pieces:
            fresh.feed(piece)
        assert_same(session, fresh)


def cut(pieces: list[Tensor], to: int) -> list[Tensor]:
    found = []
    for piece in pieces:
        found.append(piece[:, :to])
        to -= found[-1].shape[1]
        if to == 0:
            return found if found[-1].shape[1] else found[:-1]
    return found


@every_model
def test_rewind_to_every_point(model) -> None:
    ids, splits = text(40), [5, 6, 20, 33]
    for to in range(1, 41):
        session = fed(model, ids, splits).rewind(to)
        assert_same(session, fed(model, ids[:, :to], [s for s in splits if s < to]))
        again = session.fork().rewind(min(to, 5))
        assert_same(again, fed(model, ids[:, : min(to, 5)], []))
    assert_same(fed(model, ids, splits).rewind(0), Session(model))


@every_model
def test_writing_again_after_a_rewind(model) -> None:
    session = fed(model, text(30), [13])
    first = session.generate(20, seed=4)
    for to in (30, 30, 41):
        session.rewind(to)
        assert torch.equal(session.generate(50 - to, seed=4), first[:, to - 30 :])


def test_reach() -> None:
    model = MODELS["lstm"]
    session = fed(model, text(200), list(range(10, 200, 10)), snapshot_bytes=0)
    assert session.reach == session.seen == 200
    assert_same(session.rewind(200), session.fork())
    before = kept(session)
    for to in (199, -1, 201):
        with pytest.raises(ValueError, match=rf"to={to}, .* back to 200 .* read 200 tokens"):
            session.rewind(to)
    assert all(torch.equal(a, b) for a, b in zip(kept(session), before))
    assert fed(model, text(200), [100]).reach == 0


@pytest.mark.parametrize("snapshots", [2.5, 6, 20, 100])
def test_snapshots_stay_within_their_budget(snapshots: float) -> None:
    """And the way back stays whole, with what is kept denser near the present."""
    model = MODELS["mingru"]
    one = fed(model, text(1), [])._snapshot().nbytes
    session = Session(model, snapshot_bytes=int(one * snapshots))
    for i in range(300):
        session.feed(text(3, seed=i))
        held = session._history.snapshots
        assert sum(s.nbytes for s in held) <= one * snapshots
        assert session.reach == 0 and held[-1].position == session.seen
    if snapshots >= 20:
        assert any(s.position > 800 for s in held[:-1]) and any(0 < s.position < 450 for s in held)
    afresh = fed(model, torch.cat([text(3, seed=i) for i in range(200)], 1), list(range(3, 600, 3)))
    assert_same(session.rewind(600), afresh)


def test_snapshots_hold_no_more_than_they_count() -> None:
    """No view of a whole piece's activations stands behind a state."""
    for model in MODELS.values():
        session = fed(model, text(500), [])
        tensors = [t for _, t in session.state.items()] + [session.logits]
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= session._snapshot().nbytes


def test_no_way_back_keeps_no_tokens() -> None:
    session = fed(MODELS["mingru"], text(3000), list(range(100, 3000, 100)), snapshot_bytes=0)
    assert len(session._history.log.lengths) <= 1


def test_tokens_move_to_disk(monkeypatch) -> None:
    monkeypatch.setattr(history, "_SPOOL_BYTES", 1000)
    model, splits = MODELS["hybrid"], list(range(37, 900, 37))
    small = fed(model, text(4), [])._snapshot().nbytes * 3
    session = fed(model, text(900), splits, snapshot_bytes=small)
    fork = session.fork()
    fork.feed(text(600, seed=1))
    files = [part[0] for part in fork._history.log._parts]
    assert len(files) == 2 and all(file._rolled for file in files)
    there = fed(model, text(900), splits)
    there.feed(text(600, seed=1)[:, :300])
    assert_same(fork.rewind(1200), there)
    for to in (555, 101):
        there = fed(model, text(900)[:, :to], [s for s in splits if s < to])
        assert_same(session.rewind(to), there)
        assert_same(fork.rewind(to), there)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("back", [95, 155, 215])
def test_a_fork_keeps_what_the_other_rewrites(first: int, back: int) -> None:
    model, splits = MODELS["mingru"], list(range(30, 300, 30))
    session = fed(model, text(300), splits, snapshot_bytes=8000)
    both = [session, session.fork()]
    both[first].rewind(back).feed(text(200, seed=1))
    assert_same(
        both[1 - first].rewind(265), fed(model, text(300)[:, :265], [s for s in splits if s < 265])
    )


def test_load_keeps_the_chunk_and_counts_on(tmp_path: Path) -> None:
    model = MODELS["mingru"]
    session = fed(model, text(20), [], chunk=6)
    session.save(tmp_path / "a.state")
    loaded = Session.load(tmp_path / "a.state", model)
    assert loaded.chunk == 6 and loaded.reach == loaded.seen == 20
    for one in (session, loaded):
        one.feed(text(20, seed=1))
    assert_same(session, loaded)
    assert_same(session.rewind(31), loaded.rewind(31))
    with pytest.raises(ValueError, match="another model"):
        Session.load(tmp_path / "a.state", MODELS["lstm"])


def test_any_state_file_of_the_model_will_do(tmp_path: Path) -> None:
    model = MODELS["lstm"]
    state = model(text(9, rows=2)).state
    save_state(state, tmp_path / "a.state", model)
    loaded, straight = Session.load(tmp_path / "a.state", model), Session(model, state=state)
    assert loaded.seen == 9 and loaded.logits is None
    assert torch.equal(*(s.feed(text(5, rows=2, seed=1)) for s in (loaded, straight)))


def test_writing_is_a_function_of_seed_and_place() -> None:
    session = fed(MODELS["mingru"], text(10), [])
    options = [dict(temperature=0), dict(seed=1), dict(seed=2), dict(top_k=3), dict(top_p=0.5)]
    found = [session.fork().generate(25, **o) for o in options]
    for o, first in zip(options, found):
        torch.manual_seed(7)
        parts = session.fork()
        assert torch.equal(torch.cat([parts.generate(n, **o) for n in (9, 0, 16)], 1), first)
    assert len({tuple(f[0].tolist()) for f in found}) == len(options)
    assert len(set(found[1][0].tolist())) > 12
    greedy = session.fork()
    for token in greedy.stream(5, temperature=0):
        assert session.feed(token[None]) is session.logits
    assert torch.equal(found[0][:, :5], greedy.rewind(10).generate(5, temperature=0))


def test_top_k_and_stop() -> None:
    session = fed(MODELS["lstm"], text(10), [])
    drawn = {int(session.fork().generate(1, top_k=2, seed=s)) for s in range(40)}
    assert drawn == set(session.logits.topk(2).indices[0].tolist())
    free = session.fork().generate(30, seed=3)[0].tolist()
    short = free[: free.index(free[7]) + 1]
    assert session.generate(30, seed=3, stop=free[7])[0].tolist() == short
    assert session.seen == 10 + len(short)


@every_model
def test_rows_are_independent(model) -> None:
    ids = text(40, rows=3)
    together = fed(model, ids, [17])
    written = together.generate(15, temperature=0)
    for i in range(3):
        alone = fed(model, ids[i : i + 1], [17])
        assert torch.equal(alone.generate(15, temperature=0), written[i : i + 1])
        assert torch.allclose(alone.logits[0], together.logits[i], atol=2e-5)


def test_what_is_refused() -> None:
    model = MODELS["mingru"]
    session = Session(model)
    acts = {
        "nothing has been read": lambda: session.generate(3),
        "no tokens": lambda: session.feed([]),
        r"ids is \(2, 4\), expected \(B, T\) = \(1, any\)": lambda: session.feed(text(4, rows=2)),
        "temperature": lambda: fed(model, text(3), []).generate(3, temperature=-1),
        "chunk=0": lambda: Session(model, chunk=0),
        "batch_size=3": lambda: Session(model, state=model.init_state(2), batch_size=3),
    }
    for reason, act in acts.items():
        with pytest.raises(ValueError, match=reason):
            act()
    assert Session(model, state=model.init_state(2)).feed(text(4, rows=2)).shape == (2, 257)


def test_a_model_that_raises_changes_nothing() -> None:
    model = make_model().eval()
    session = fed(model, text(20), [9])
    twin = session.fork()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    for act in (lambda: session.feed(text(5)), lambda: session.generate(2)):
        with pytest.raises(RuntimeError, match="out of memory"):
            act()
        assert_same(session, twin)
    hook.remove()
    with pytest.raises(ValueError, match="id 999 is not in the vocabulary of 257 tokens"):
        session.feed([5, 999])
    with pytest.raises(ValueError, match="id -1 is not in the vocabulary"):
        session.feed([5, -1])
    with pytest.raises(ValueError, match="id 257 is not"):
        session.feed([256, 257])
    for one in (session, twin):
        one.feed(text(7, seed=2))
    assert_same(session, twin)
    assert_same(session.rewind(11), twin.rewind(11))
