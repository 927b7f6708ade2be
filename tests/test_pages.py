"""The pages of the docs site, run as they stand, print what they show."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from typing import TextIO

import pytest
from test_docs import PAGES, VERBS, blocks, commands

from statewright.cli import main

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_PIECE = re.compile(rf"(?P<any>\.\.\.)|(?P<number>{_NUMBER})|(?P<space>\s+)|(?P<rule>[━─]+)")


def differs(shown: str, got: str) -> str | None:
    """Where output differs from what a page shows: "..." stands for anything, numbers may be
    2 % or three of their last digits off (another machine's rounding), spaces are free."""
    pattern, last = "", 0
    shown, got = shown.strip(), got.strip()
    for piece in _PIECE.finditer(shown):
        pattern += re.escape(shown[last : piece.start()])
        pattern += {"any": ".*?", "number": f"({_NUMBER})", "space": r"\s+", "rule": "[━─]+"}[
            piece.lastgroup or "any"
        ]
        last = piece.end()
    found = re.fullmatch(pattern + re.escape(shown[last:]), got, re.S)
    if not found:
        return f"the words differ; printed:\n{got}"
    numbers = [piece[0] for piece in _PIECE.finditer(shown) if piece.lastgroup == "number"]
    for want, have in zip(numbers, found.groups()):
        digits = len(want.partition(".")[2])
        off = abs(float(have.replace(",", "")) - float(want.replace(",", "")))
        near = 0.02 * float(want.replace(",", "")) + (3 * 10.0**-digits if digits else 0)
        if off > near:
            return f"{have} is printed, {want} is shown"
    return None


def test_what_differs_is_seen() -> None:
    shown = "loss  1.25\n...\nstate 2,072 bytes ━━━"
    assert differs(shown, "loss 1.27\na\nb\nstate 2,072 bytes ━━━━━") is None
    assert "2.25 is printed" in (differs(shown, "loss 2.25\na\nstate 2,072 bytes ━") or "")
    assert "2,172 is printed" in (differs(shown, "loss 1.25\na\nstate 2,172 bytes ━") or "")
    assert "words differ" in (differs(shown, "loss 1.25\na\nstate 2,072 tokens ━") or "")
    assert "words differ" in (differs(shown, "") or "")


def run(words: list[str]) -> int:
    if words[0] == "statewright":
        return main(words[1:])
    other = subprocess.run(words, capture_output=True, text=True)
    print(other.stdout, end="")
    return other.returncode


def printed(block: str) -> str:
    """What a terminal shows of the commands, in order; `> file` goes there."""
    screen = io.StringIO()
    for words in commands(block):
        with contextlib.ExitStack() as files:
            out: TextIO = screen
            if ">" in words:
                *words, _, name = words
                out = files.enter_context(open(name, "w", encoding="utf-8"))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(screen):
                code = run(words)
        assert code == 0, (words, screen.getvalue())
    return screen.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_print_what_they_show(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "88")
    if page in VERBS:
        printed("statewright demo demo")
    output = None
    for kind, block in blocks(page):
        if kind == "bash":
            output = printed(block)
        elif kind == "text" and output is not None:
            assert (wrong := differs(block, output)) is None, f"{page.name}: {wrong}"
        elif kind == "python":
            exec(block, {})
