"""Text files: what is text, what is not, and that every reader and every verb goes the one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_floors import MODULES, PACKAGE

from statewright.text_file import read_text, whole_text

many = settings(max_examples=80, deadline=None, derandomize=True)
BOM = b"\xef\xbb\xbf"


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
@many
def test_a_file_with_the_mark_is_the_file_without(tmp_path_factory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "mark.txt"
    body = "x" + text + "word and " * 2000
    path.write_bytes(body.encode())
    plain = list(read_text(path))
    path.write_bytes(BOM + body.encode())
    assert list(read_text(path)) == plain
    assert whole_text(path) == body


STRANGE = {
    "utf-16": ("\ufeffwords".encode("utf-16-le"), "UTF-16 text, expected UTF-8"),
    "utf-16-be": ("\ufeffwords".encode("utf-16-be"), "UTF-16 text, expected UTF-8"),
    "utf-32": ("\ufeffwords".encode("utf-32-le"), "UTF-32 text, expected UTF-8"),
    "nul": (b"wo\0rds", "a binary file"),
    "invalid": (BOM + b"word " * 9000 + b"\xe2 ", r"byte 45,003\)"),
    "cut": (b"word \xe2\x82", "it ends inside a character, byte 5"),
    "mark alone": (BOM, "the file is empty"),
}


@pytest.mark.parametrize("content, reason", STRANGE.values(), ids=STRANGE)
def test_what_is_no_text_is_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "strange"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        whole_text(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_line_ends_and_later_marks_are_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xef\xbb\xbfd")
    assert whole_text(path) == "a\r\nb\rc\n\ufeffd"


# --- the one way in and out ------------------------------------------------------------------

# Where files are opened that are no user's text: JSON and pages of ours, weights, the system's.
_OWN_FILES = {
    "state_file", "cells", "text_file", "ops.native_digest", "checks.peak", "report.xray",
    "studies.train_cost", "studies.rl.collect", "train.loop", "train.data_files",
    "train.checkpoint", "train.distributed", "models.stream", "models.weights", "models.shim",
    "models.load", "hf.fetch", "hf.pretrained", "provenance", "diagnosis.train_length",
    "demos.__init__", "signatures",
    "bench.memory", "bench.table",
}  # fmt: skip


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_text_goes_in_and_out_through_one_module(path: Path) -> None:
    """No module opens a file for reading or decodes tokens by itself."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    wrong = []
    for node in calls(path):
        called = ast.unparse(node.func)
        reads = called == "open" or called.endswith((".read_text", ".read_bytes", ".open"))
        if reads and called != "os.open" and name not in _OWN_FILES:
            wrong.append(ast.unparse(node))
        if called.endswith(("tokenizer.decode", ".batch_decode")) and name != "token_text":
            wrong.append(ast.unparse(node))
    assert wrong == []
