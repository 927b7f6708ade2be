"""The README's snippets run as they stand there, shell lines through the command line's main."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from statewright.cli import main

README = Path(__file__).parents[1] / "README.md"
# A reader trains for minutes; the test only needs a model.
FASTER = "--num-steps 3 --num-lanes 2 --length 32 --hidden-size 16 --num-layers 2".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_blocks_run() -> None:
    found = blocks("python")
    assert len(found) == 4
    exec("\n".join(found), {})


def test_shell_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 40)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in commands]
    ours = [words[1:] for words in commands if words and words[0] == "statewright"]
    assert len(ours) >= 7
    for words in ours:
        assert main(words + (FASTER if words[0] == "train" else [])) == 0, words
