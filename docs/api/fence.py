"""Examples in docstrings, which stand at their ends, as blocks of code for the API reference."""

from __future__ import annotations

from typing import Any

import griffe


class ExamplesAsCode(griffe.Extension):
    """Markdown would read `>>>` as quotations of quotations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text, mark, example = obj.docstring.value.partition("\n>>> ")
            if mark:
                obj.docstring.value = f"{text}\n```pycon\n>>> {example.rstrip()}\n```"
