"""Docstrings as Markdown: what is no code stands as it is, examples (at the end) become blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Markdown would read `>>>` as quotations of quotations, and h_t = a_t h_{t-1} as emphasis."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text, mark, example = obj.docstring.value.partition("\n>>> ")
            parts = re.split(r"(`[^`]*`)", text)
            parts[::2] = [re.sub(r"([_*])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
            block = f"\n```pycon\n>>> {example.rstrip()}\n```" if mark else ""
            obj.docstring.value = "".join(parts) + block
