"""Where what is fetched or unpacked lies, and how a directory comes to be there at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """Where fetched, converted and unpacked models lie; may not exist yet.

    $STATEWRIGHT_HOME/models; without it $XDG_CACHE_HOME/statewright/models, or that of ~/.cache.
    """
    own = os.environ.get("STATEWRIGHT_HOME")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "statewright") / "models"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a directory beside `target` to fill, which then takes its name: whole or not at all.

    If another process was faster, its copy, which must be as good, stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    try:
        yield scratch
        # mkdtemp's own mode would keep other users out.
        scratch.chmod(target.parent.stat().st_mode & 0o777)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
