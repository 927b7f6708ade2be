"""The tutorials: every command is known; run as they stand, pages print what they show."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_docs import parsed, take_every_path

from statewright.cli import main

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_PIECE = re.compile(rf"(?P<any>\.\.\.)|(?P<number>{_NUMBER})|(?P<space>\s+)|(?P<rule>[━─]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[list[str]]:
    for line in block.splitlines():
        yield shlex.split(line, comments=True)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known_and_the_first_shows_something(page, monkeypatch) -> None:
    take_every_path(monkeypatch)
    found = blocks(page)
    assert [kind for kind, _ in found[:2]] == ["bash", "text"]
    for kind, block in found:
        if kind in ("bash", "sh"):
            for words in commands(block):
                assert words[0] == "statewright"
                parsed(words[1:])
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / picture).stat().st_size < 150_000


def test_what_differs_is_seen() -> None:
    shown = "loss  1.25\n...\nstate 2,072 bytes ━━━"
    assert differs(shown, "loss 1.27\na\nb\nstate 2,072 bytes ━━━━━") is None
    assert "2.25 is printed" in (differs(shown, "loss 2.25\na\nstate 2,072 bytes ━") or "")
    assert "2,172 is printed" in (differs(shown, "loss 1.25\na\nstate 2,172 bytes ━") or "")
    assert "words differ" in (differs(shown, "loss 1.25\na\nstate 2,072 tokens ━") or "")
    assert "words differ" in (differs(shown, "") or "")


def printed(block: str) -> str:
    """What a terminal shows of the commands, in order."""
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        codes = [main(words[1:]) for words in commands(block)]
    assert not any(codes), screen.getvalue()
    return screen.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_print_what_they_show(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "88")
    output = ""
    for kind, block in blocks(page):
        if kind == "bash":
            output = printed(block)
        elif kind == "text":
            assert (wrong := differs(block, output)) is None, f"{page.name}: {wrong}"
        elif kind == "python":
            exec(block, {})
