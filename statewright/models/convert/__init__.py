"""Checkpoints of other libraries, in and out: a file per family and a line here."""

from __future__ import annotations

from statewright.models.convert import gla, llama, mamba, mamba2
from statewright.models.convert.family import Family

FAMILIES: dict[str, Family] = {
    "mamba2": mamba2.FAMILY,
    "mamba": mamba.FAMILY,
    "gla": gla.FAMILY,
    **dict.fromkeys(llama.KINDS, llama.FAMILY),
}

__all__ = ["FAMILIES", "Family"]
