"""Every mistake in a name, a path or a number is told before torch is loaded, by every verb."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from statewright.cli import cli
from statewright.cli.types import Count, Model, Names, Number, Spec, Text
from statewright.signatures import read_least

# What an option of this name is, wherever it stands: a new verb is held to it unasked.
NAMED = {"policy": Spec, "policies": Spec, "mixer": Spec, "tasks": Spec, "model": Model}
NAMED |= {"models": Model, "text": Text, "valid_text": Text, "report_text": Text}
NAMED |= {"prompt_file": Text, "load_state": Text, "family": Names, "seed": Count, "seeds": Count}
NAMED |= {"tokenizer": Model, "max_new_tokens": Count, "temperature": Number, "top_p": Number}
# lm-eval's own names are known to lm-eval alone.
UNKNOWN = {("lm-eval", "tasks")}


def verbs(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*path, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name), command


def test_every_option_has_the_type_of_its_name() -> None:
    held = [
        (" ".join(path), parameter.name, type(parameter.type))
        for path, verb in verbs()
        for parameter in verb.params
        if parameter.name in NAMED and (" ".join(path), parameter.name) not in UNKNOWN
    ]
    assert len(held) > 50
    assert [entry for entry in held if not issubclass(entry[2], NAMED[entry[1]])] == []


def wrong(kind: click.ParamType) -> Iterator[tuple[str, str]]:
    """(a wrong value, what the message names)."""
    if isinstance(kind, Spec):
        for name in kind.registry:
            yield f"{name}x", "did you mean"
            option = next(iter(kind.registry.options(name)))
            yield f"{name}:{option}x=1", f"did you mean {option!r}"
            for option, least in read_least(kind.registry.homes[name]).items():
                yield f"{name}:{option}={least - 1}", f"expected at least {least}"
        yield f"{next(iter(kind.registry))}:", "expected name:key=value"
        yield "no_such_module:Class", "No module named 'no_such_module'"
    elif isinstance(kind, Names):
        yield "qqq", "unknown"
    elif isinstance(kind, Model | Text):
        yield "nothin", "did you mean nothing"
    elif isinstance(kind, Count):
        yield "1x", "not a count"
        yield str(kind.least - 1), f"expected at least {kind.least}"
        if kind.most is not None:
            yield str(kind.most + 1), f"expected at most {kind.most:,}"
    elif isinstance(kind, Number):
        yield "nan", "expected a number"
        yield str(kind.least - 1), "expected a number"


def mistakes() -> list[tuple[list[str], str]]:
    found = []
    for path, verb in verbs():
        for parameter in verb.params:
            for value, named in wrong(parameter.type):
                given = [value] if isinstance(parameter, click.Argument) else []
                options = [] if given else [f"{parameter.opts[-1]}={value}"]
                found.append(([*path, *options, "--", *given], named))
    return found


RUN = """
import contextlib, io, json, sys
from statewright.cli import main
found = []
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    found.append([code, out.getvalue(), err.getvalue()])
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "slow imports"
json.dump(found, sys.stdout)
"""


def test_every_wrong_value_of_every_verb_is_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "nothing").write_text("")
    asked = mistakes()
    assert len(asked) > 400 and len({argv[0] for argv, _ in asked}) > 15
    ran = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([argv for argv, _ in asked]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    for (argv, named), (code, out, err) in zip(asked, json.loads(ran.stdout), strict=True):
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, code, err)
        assert err.startswith("statewright: Invalid value for") and named in err, (argv, err)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--num-steps 0", "--num-steps=0, expected at least 1"),
        ("--learning-rate nan", "--learning-rate=nan, expected a positive number"),
        ("--curriculum 1k", "curriculum"),
        ("--valid-share 1", "valid-share=1.0"),
    ],
)
def test_numbers_of_training_are_checked_before_torch(argv: str, named: str) -> None:
    asked = ["train", "--text", __file__, "--output-dir", "x", *argv.split()]
    code = "import sys; from statewright.cli import main; "
    code += f"print(main({asked}), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "1 False\n" and named in ran.stderr
