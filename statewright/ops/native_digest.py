"""The digest that ties the compiled library to its sources; `setup.py` runs this file alone."""

import hashlib
from pathlib import Path


def source_digest(folder: Path) -> str:
    """Hex digest of the C sources and compiler flags in `folder`, names included.

    It is compiled into the library and compared again when the library is loaded, so that a
    library left over from older sources is never used.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".c", ".h", ".txt"}):
        text = path.read_bytes()
        digest.update(f"{path.name}:{len(text)}:".encode() + text)
    return digest.hexdigest()[:32]
