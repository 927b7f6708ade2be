"""Sessions that let a call write over the state it starts from, where nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_session_policies import assert_same, fed, own, text

from statewright import history
from statewright.session import Session


class Watched:
    """What a model was asked, call by call: whether it may consume its state."""

    def __init__(self, model: Any) -> None:
        self.donated: list[bool] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict) -> None:
        self.donated.append(kwargs.get("donate", False))


DONATING = ["none", "tova:budget=7", "window:budget=7:sinks=2", "h2o:budget=64KiB"]


@pytest.mark.parametrize("policy", DONATING)
def test_states_are_consumed_only_when_nobody_looks(policy: str, monkeypatch) -> None:
    """And whoever looks, forks or keeps a state changes no bit of what follows."""
    monkeypatch.setattr(history, "_SINGLES", 8)
    model = own("attention:num_heads=4").float()
    watched = Watched(model)
    alone, seen = fed(model, text(10), policy=policy), []
    written = alone.generate(30, seed=1)
    # A snapshot holds the state after the prompt; those on the way are copies.
    assert watched.donated[1:] == [i > 0 for i in range(30)]
    held = alone._history.snapshots
    assert [s.position for s in held] == [0, 10, 18, 26, 34]
    for snapshot in held[2:]:
        sizes = [t.untyped_storage().nbytes() for _, t in snapshot.state.items()]
        assert sum(sizes) == snapshot.state.nbytes
    looked, states = fed(model, text(10), policy=policy), []
    for i, ids in enumerate(looked.stream(30, seed=1)):
        seen.append(ids)
        if i % 3 == 0:
            states.append((looked.state, looked.state.map(torch.clone)))
            del watched.donated[:]
        elif i % 3 == 1:
            assert watched.donated == [False]
        if i == 20:
            fork, point = looked.fork(), len(seen)
    assert torch.equal(torch.stack(seen, 1), written)
    assert_same(looked, alone)
    rest = torch.stack(list(fork.stream(30 - point, seed=1)), 1)
    assert torch.equal(rest, written[:, point:])
    assert_same(fork, alone)
    for state, kept in states:
        for (name, x), (_, y) in zip(state.items(), kept.items(), strict=True):
            assert torch.equal(x, y), name
        model(text(1), state=state, policy=policy)
    for to in (33, 27, 12):
        session = looked.fork().rewind(to)
        assert torch.equal(session.generate(40 - to, seed=1), written[:, to - 10 :])
        assert_same(session, alone)


def test_what_a_state_is_not_consumed_for() -> None:
    """Recurrent models have nothing to gain, and a window alone would change the order."""
    for mixer in ("mingru", "attention:num_heads=2:window=6", ("attention:window=6", "attention")):
        model = own(mixer)
        watched = Watched(model)
        fed(model, text(10)).generate(20)
        assert not any(watched.donated)
    fed(model, text(10), policy="tova:budget=4").generate(20)
    assert any(watched.donated)


@pytest.mark.parametrize("policy", ["none", "tova:budget=7"])
def test_a_call_that_fails_with_a_consumed_state(policy: str, tmp_path: Path) -> None:
    """The state is gone, but the way back leads to it again, bit for bit."""
    model = own("attention:num_heads=4").float()

    def prepared() -> Session:
        session = fed(model, text(10), policy=policy)
        session.generate(6, seed=1)
        return session

    session, twin = prepared(), prepared()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            session.generate(1, seed=1)
    hook.remove()
    fork, nbytes = session.fork(), session.nbytes
    assert nbytes == twin.nbytes
    session.save(tmp_path / "a.state")
    assert_same(Session.load(tmp_path / "a.state", model), twin)
    for one in (session, fork):
        assert_same(one, twin)
        assert torch.equal(one.generate(9, seed=2), twin.fork().generate(9, seed=2))
    assert_same(session.rewind(12), twin.rewind(12))


def test_a_donated_state_is_refused_with_the_reason() -> None:
    model = own("attention:num_heads=4")
    with torch.no_grad():
        first = model(text(10)).state
        second = model(text(1), state=first, donate=True).state
        with pytest.raises(ValueError, match="donated to an earlier call"):
            model(text(1), state=first)
        model(text(1), state=second)
