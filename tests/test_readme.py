"""The README: its Python runs as it stands, its shell lines are words that the command line takes.

`test_first_hour.py` runs the shell lines too, in a new environment.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_docs import parsed, take_every_path

from statewright import demos
from statewright.cli import cli

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    demos.write(".")
    found = blocks("python")
    assert len(found) == 4
    exec("\n".join(found), {})


def test_shell_lines_are_known_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    take_every_path(monkeypatch)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`(statewright [^`]+)`", README.read_text())
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [words[1:] for words in commands if words and words[0] == "statewright"]
    assert len(ours) >= 16 and {words[0] for words in ours} <= set(cli.commands)
    for words in ours:
        parsed(words)
