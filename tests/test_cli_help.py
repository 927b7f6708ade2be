"""What --help says of every verb: whole sentences under headings, an example that can be typed."""

from __future__ import annotations

import shlex

import click
import pytest
from test_cli_mistakes import verbs

from statewright.cli import VERBS, cli, main
from statewright.cli.common import first_sentence

EVERY = [(" ".join(path), verb) for path, verb in verbs()]
GROUPS = [("", cli)] + [(n, c) for n, c in EVERY if isinstance(c, click.Group)]
named = pytest.mark.parametrize(("name", "verb"), EVERY, ids=[name for name, _ in EVERY])


def helped(capsys, name: str) -> str:
    capsys.readouterr()
    assert main([*name.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize(("name", "group"), GROUPS, ids=[name for name, _ in GROUPS])
def test_every_verb_is_told_in_a_whole_sentence(
    name: str, group: click.Group, width: int, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = helped(capsys, name)
    words = " ".join(text.split())
    assert text.startswith("Usage:") and "..." not in text.split("\n", 1)[1]
    for command in group.commands.values():
        said = first_sentence(command)
        assert said.endswith(".") and " ".join([command.name, said]) in words
    assert all(len(line) <= width for line in text.splitlines() if "Example:" not in line)


def test_headings_hold_every_verb_once(capsys) -> None:
    listed = [verb.name for verbs_ in VERBS.values() for verb in verbs_]
    assert sorted(listed) == sorted(cli.commands) and len(set(listed)) == len(listed)
    assert [title for title in VERBS if f"\n{title}:\n" not in helped(capsys, "")] == []


@named
def test_help_begins_with_what_a_verb_does_and_an_example(name: str, verb, capsys) -> None:
    text = helped(capsys, name)
    said, example = text.split("\n\n")[1:3]
    assert " ".join(said.split()).startswith(first_sentence(verb))
    typed = shlex.split(example.strip().removeprefix("Example: "))
    assert typed[:1] == ["statewright"] and typed[1 : 1 + len(name.split())] == name.split()
    # Every option in it is one, and nothing that is needed lacks.
    command, rest = cli, typed[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    values, left, _ = command.make_parser(click.Context(command)).parse_args(list(rest))
    assert left == []
    lacking = [p.name for p in command.params if p.required and not values.get(p.name)]
    assert lacking == []
