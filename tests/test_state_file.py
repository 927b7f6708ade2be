"""State files: bit-equal or refused, whole or absent, and never anything unpickled."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_train import make_model
from torch import Tensor

from statewright import state_file
from statewright.cli import main
from statewright.state import KVState, MatrixState, ModelState, State, VectorState
from statewright.state_file import fingerprint, load_state, read_state_file, save_state


def vector(dtype: torch.dtype = torch.float32, rows: int = 2) -> VectorState:
    h = torch.randn(rows, 5, dtype=dtype)
    return VectorState(h=h, seen=torch.tensor([3, 2**40])[:rows])


def states() -> dict[str, State]:
    seen = torch.tensor([7, 0])
    lstm = vector().with_extra("c", torch.randn(2, 5), "batch channel")
    matrix = MatrixState(S=torch.randn(2, 3, 4, 5).transpose(2, 3), seen=seen)
    rows = torch.randn(2, 1, 6, 4, dtype=torch.bfloat16)
    pos = torch.tensor([[[0, 1, 2, -1, -1, -1]], [[5, 3, 4, 9, 8, 7]]])
    kv = KVState(k=rows, v=rows.neg(), pos=pos, seen=seen)
    none = KVState(k=rows[:, :, :0], v=rows[:, :, :0], pos=pos[:, :, :0], seen=seen)
    odd = vector().with_extra("z", torch.tensor([[1 + 2j], [0j]]), "batch mode")
    special = replace(vector(), h=torch.tensor([[torch.nan] * 2, [-0.0, torch.inf]]))
    return {
        "vector": vector(),
        "float64": vector(torch.float64),
        "bfloat16": vector(torch.bfloat16),
        "extra": lstm,
        "complex": odd,
        "special values": special,
        "expanded": replace(vector(), h=torch.randn(1, 5).expand(2, -1)),
        "matrix": matrix,
        "kv": kv,
        "empty": none,
        "no rows": replace(vector(), h=torch.zeros(0, 5), seen=torch.zeros(0, dtype=torch.long)),
        "model": ModelState(layers=(lstm, matrix, kv), seen=seen),
        "nested": ModelState(layers=((kv, (matrix, lstm)), vector(), (none,)), seen=seen),
        "model of none": ModelState(layers=(), seen=seen),
    }


def raw(t: Tensor) -> tuple:
    return t.dtype, t.shape, bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy())


def shape_of(node: Any) -> Any:
    if isinstance(node, tuple):
        return tuple(map(shape_of, node))
    return type(node), shape_of(node.layers) if isinstance(node, ModelState) else None


def assert_equal(a: State, b: State) -> None:
    assert shape_of(a) == shape_of(b)
    assert [(n, raw(t), x) for n, t, x in a.named()] == [(n, raw(t), x) for n, t, x in b.named()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.state"


@pytest.mark.parametrize("kind", states())
def test_round_trip(kind: str, path: Path) -> None:
    state = states()[kind]
    save_state(state, path)
    assert_equal(load_state(path), state)
    assert os.listdir(path.parent) == ["a.state"]


def test_everything_beside_the_state(path: Path) -> None:
    beside = {"logits": torch.randn(2, 7), "bits": torch.tensor([True, False])}
    about = {"position": 12, "note": "né", "nested": {"a": [1, None]}}
    save_state(
        vector(), path, policy="tova:budget=8", tokens_hash="ab-1", beside=beside, about=about
    )
    found = read_state_file(path)
    assert {n: raw(t) for n, t in found.beside.items()} == {n: raw(t) for n, t in beside.items()}
    assert (found.policy, found.tokens_hash, found.about) == ("tova:budget=8", "ab-1", about)
    assert found.fingerprint is None


def test_a_loaded_state_is_its_own(path: Path) -> None:
    """Overwriting the file in place, as `cp` does, must not reach into a loaded state."""
    state = states()["nested"]
    save_state(state, path)
    loaded = load_state(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert_equal(loaded, state)


def test_only_this_model(path: Path) -> None:
    model = make_model()
    state = model.init_state(2)
    save_state(state, path, model)
    for same in (model, make_model(), None):
        assert_equal(load_state(path, same), state)


@pytest.mark.parametrize("change", ["one ulp", "config", "dtype", "layers"])
def test_another_model_is_refused(change: str, path: Path) -> None:
    model = make_model()
    save_state(model.init_state(1), path, model)
    other = make_model(norm="layernorm") if change == "config" else make_model()
    if change == "one ulp":
        weight = other.model.layers[1].mixer.in_proj.weight.data[3, 3]
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
    elif change == "dtype":
        other = other.to(torch.bfloat16)
    elif change == "layers":
        other = make_model("minlstm")
    with pytest.raises(ValueError, match="the state of another model"):
        load_state(path, other)


def test_a_state_of_no_model_is_no_models(path: Path) -> None:
    save_state(make_model().init_state(1), path)
    with pytest.raises(ValueError, match="another model"):
        load_state(path, make_model())


def test_fingerprint_survives_saving(tmp_path: Path) -> None:
    model = make_model(["mingru", "lstm"])
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)


@pytest.mark.parametrize("made, asked", [("tova:budget=8", None), (None, "window"), ("a", "b")])
def test_another_policy_is_refused(made: str | None, asked: str | None, path: Path) -> None:
    model = make_model()
    save_state(model.init_state(1), path, model, policy=made)
    load_state(path, model, policy=made)
    with pytest.raises(ValueError, match=f"under policy {made or 'none'}, not {asked or 'none'}"):
        load_state(path, model, policy=asked)


def small(path: Path) -> State:
    state = ModelState(layers=(vector(),), seen=torch.tensor([3, 4]))
    save_state(state, path, tokens_hash="1-2", beside={"logits": torch.ones(2)}, about={"x": 1})
    return state


def test_every_truncation_is_refused(path: Path) -> None:
    small(path)
    whole = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.state: "):
            load_state(path)


def test_another_format_is_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(state_file, "FORMAT", 2)
    save_state(vector(), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"newer statewright \(format 2, .*update"):
        load_state(path)


@pytest.mark.parametrize(
    "kind", ["safetensors", "metadata", "text", "empty", "directory", "missing"]
)
def test_other_things_are_refused(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind in ("safetensors", "metadata"):
        save_file({"h": torch.ones(2)}, path, {"format": "pt"} if kind == "metadata" else None)
    elif kind != "missing":
        path.write_text("it was a dark and stormy night\n" * (kind == "text"))
    with pytest.raises(ValueError) as caught:
        load_state(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to three random flips, overwrites, insertions or deletions."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        at, length = draw.randrange(len(data)), draw.choice([1, 1, 1, 2, 8, 40])
        kind = draw.randrange(5)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = draw.randbytes(min(length, len(data) - at))
        elif kind == 2:
            data[at:at] = draw.randbytes(length)
        elif kind == 3:
            del data[at : at + length]
        else:
            data[at] = draw.choice(b'0123456789",:{}[]FIUB \\')
    return bytes(data)


def test_a_thousand_mutations(path: Path) -> None:
    """Half of them in the header, where most can go wrong: refused, or the identical state."""
    state = small(path)
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for i in range(1000):
        changed = mutate(whole[:header], draw) + whole[header:] if i % 2 else mutate(whole, draw)
        path.write_bytes(changed)
        try:
            loaded = load_state(path)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_equal(loaded, state)
    assert refused > 900


def test_swapped_and_renamed_tensors_are_refused(path: Path) -> None:
    """Sound safetensors, but not what was written: the digest covers names and axes too."""
    save_state(vector(rows=2), path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for old, new in (
        (b"batch channel", b"batch chunnel"),
        (b"channel", b"chonnel"),
        (b"seen", b"soon"),
    ):
        header = whole[8 : 8 + length].replace(old, new)
        path.write_bytes(whole[:8] + header + whole[8 + length :])
        if header != whole[8 : 8 + length]:
            with pytest.raises(ValueError):
                load_state(path)


@pytest.mark.parametrize("how", ["full", "interrupted"])
def test_failing_writes_keep_the_old_file(how: str, path: Path, monkeypatch) -> None:
    old = small(path)
    error = OSError(28, "No space left") if how == "full" else KeyboardInterrupt()

    def half(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(state_file, "save_file", half)
    with pytest.raises(type(error)):
        save_state(vector(), path)
    assert os.listdir(path.parent) == ["a.state"]
    assert_equal(load_state(path), old)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    save_state(vector(), tmp_path / "folder" / "b.state")
    for target in (tmp_path / "file" / "a.state", tmp_path / "folder"):
        with pytest.raises(OSError):
            save_state(vector(), target)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["b.state"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directories(path: Path) -> None:
    path.parent.chmod(0o555)
    with pytest.raises(PermissionError):
        save_state(vector(), path)
    path.parent.chmod(0o755)


_KILLED = """
import os, signal, sys, torch
from statewright import state_file
from statewright.state import VectorState
def die(fd): os.kill(os.getpid(), signal.SIGKILL)
state_file.os.fsync = die
state_file.save_state(VectorState(h=torch.ones(1, 9), seen=torch.ones(1).long()), sys.argv[1])
"""


def test_killed_in_mid_save_keeps_the_old_file(path: Path) -> None:
    old = small(path)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(path.parent)) == 2
    assert_equal(load_state(path), old)


def test_nothing_is_pickled() -> None:
    source = Path(state_file.__file__).read_text()
    assert not [word for word in ("import pickle", "torch.load", "torch.save") if word in source]


def test_show(path: Path, capsys) -> None:
    save_state(states()["nested"], path, tokens_hash="abc-def", policy="window:budget=4")
    assert main(["state", "show", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("layers.0.1.1.extra.c", "slot", "abc-def", "window:budget=4", "7, 0"):
        assert part in text
    assert f"{states()['nested'].nbytes:,}" in text


def test_diff(path: Path, capsys) -> None:
    state, other = small(path), path.with_name("b.state")
    other.write_bytes(path.read_bytes())
    assert main(["state", "diff", str(path), str(other)]) == 0
    assert "tensors identical" in capsys.readouterr().out
    h = state.layers[0].h.clone()
    h[0, 0] += 0.5
    save_state(replace(state, layers=(replace(state.layers[0], h=h),)), other, tokens_hash="1-2")
    assert main(["state", "diff", str(path), str(other)]) == 1
    text = capsys.readouterr().out
    assert "layers.0.h" in text and "0.5" in text and "seen" not in text
    save_state(states()["matrix"], other)
    assert main(["state", "diff", str(path), str(other)]) == 1
    assert "only in one file" in capsys.readouterr().out


def test_diff_is_of_bits(path: Path, capsys) -> None:
    """A NaN is identical to itself, and -0.0 is not 0.0."""
    state, other = states()["special values"], path.with_name("b.state")
    save_state(state, path)
    save_state(state, other)
    assert main(["state", "diff", str(path), str(other)]) == 0
    save_state(replace(vector(), h=torch.zeros(2, 5)), path)
    save_state(replace(vector(), h=-torch.zeros(2, 5)), other)
    assert main(["state", "diff", str(path), str(other)]) == 1


@pytest.mark.parametrize("verb", ["show", "diff"])
def test_bad_files_are_one_line(verb: str, path: Path, capsys) -> None:
    path.write_text(json.dumps({"not": "a state"}))
    assert main(["state", verb, *[str(path)] * (1 + (verb == "diff"))]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"statewright: {path}: not a state file")
