"""Every verb that reads or writes text, found in the command line itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from test_cli import assert_refused, run  # noqa: F401

from statewright.cli import cli
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.sampling import Sampling
from statewright.models.tokenizers import byte_tokenizer
from statewright.session import Session

TEXT_OPTIONS = ("text", "valid_text", "report_text", "prompt_file")
BOM = b"\xef\xbb\xbf"
BODY = "Il caffè — “é” 🙂 und so weiter.\r\n".encode() * 40


def readers() -> Iterator[tuple[str, str]]:
    """(verb, option) of every option that names a text file."""
    for name, verb in cli.commands.items():
        parts = verb.commands.items() if isinstance(verb, click.Group) else [("", verb)]
        for part, command in parts:
            options = {parameter.name for parameter in command.params}
            yield from ((f"{name} {part}".strip(), o) for o in TEXT_OPTIONS if o in options)


READERS = list(readers())
# What a verb needs before it reads the file; a required option is filled in by its name.
NEEDS = {
    ("train", "valid_text"): ["--text", "{good}", "--num-steps", "1"],
    ("generate", "prompt_file"): ["--max-new-tokens", "0"],
    ("diagnose", "text"): ["--train-length", "16"],
    ("repair", "text"): ["--train-length", "16"],
    ("repair", "report_text"): ["--train-length", "16", "--length", "64"],
    ("resize", "text"): ["--key", "0.5x", "--output-dir", "{new}"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=16, num_hidden_layers=1)
    for name, mixer in (("lists", "attention"), ("states", "mamba2:state_size=8:head_dim=16")):
        StatewrightForCausalLM(StatewrightConfig(**sizes, mixer=mixer)).save_pretrained(home / name)
        byte_tokenizer().save_pretrained(home / name)
    (home / "good.txt").write_bytes(BODY * 8)
    (home / "plain.txt").write_bytes(BODY)
    (home / "marked.txt").write_bytes(BOM + BODY)
    (home / "utf-16.txt").write_bytes("\ufeffwords".encode("utf-16-le"))
    return home


def command(verb: str, option: str, file: Path, home: Path, new: Path) -> list[str]:
    top, _, part = verb.partition(" ")
    found = cli.commands[top].commands[part] if part else cli.commands[top]
    argv = [*verb.split()]
    for parameter in found.params:
        known = {"model": home / "states", "text": home / "good.txt", option: file}
        value = str(known.get(parameter.name, new))
        if parameter.name == option or parameter.required:
            named = isinstance(parameter, click.Option)
            argv += [parameter.opts[0], value] if named else [value]
    extra = NEEDS.get((verb, option), [])
    return argv + [word.format(good=home / "good.txt", new=new) for word in extra]


@pytest.mark.parametrize("verb, option", READERS, ids=map(" ".join, READERS))
def test_every_verb_refuses_what_is_no_text(verb, option, home, tmp_path, run) -> None:  # noqa: F811
    file = home / "utf-16.txt"
    ran = run(*command(verb, option, file, home, tmp_path / "new"))
    assert ran.code != 0 and "Traceback" not in ran.err
    assert f"{file}: UTF-16 text, expected UTF-8" in ran.err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_which_verbs_read_text() -> None:
    assert {verb for verb, _ in READERS} >= {"train", "data", "generate", "diagnose", "trace"}


def test_a_mark_changes_nothing_that_is_written(home, tmp_path, run) -> None:  # noqa: F811
    said, tokens = [], []
    for name in ("plain.txt", "marked.txt"):
        ran = run("generate", home / "states", "--prompt-file", home / name, "--seed", "3")
        assert ran.code == 0
        said.append(ran.out)
        out = tmp_path / f"{name}.json"
        assert run("trace", home / "lists", "--text", home / name, "--output", out).code == 0
        tokens.append(json.loads(out.read_text())["tokens"])
    page = tmp_path / "page.html"
    assert run("report", out, "--out", page).code == 0
    assert "\ufffd" not in page.read_text(encoding="utf-8")
    assert said[0] == said[1] and tokens[0] == tokens[1]
    assert "\ufffd" not in "".join(tokens[0]) and {"è", r"\xa8", "🙂", "\r"} <= set(tokens[0])


def test_generate_prints_bytes_as_python_does(home, run, monkeypatch) -> None:  # noqa: F811

    row = "né €".encode() + b"\xe2 \x80z" + "🙂".encode()
    ids = [torch.tensor([byte]) for byte in row]
    monkeypatch.setattr(Session, "stream", lambda *given, **options: iter(ids))
    ran = run("generate", home / "states", "--prompt", "“x”")
    assert ran.code == 0 and ran.out == "“x”" + row.decode(errors="replace") + "\n"


def test_a_prompt_of_broken_bytes_is_refused(home, run) -> None:  # noqa: F811
    """What the system hands over for an argument that is no UTF-8."""
    ran = run("generate", home / "states", "--prompt", "caf\udce9")
    assert_refused(ran, "--prompt", "UTF-8")


def test_a_state_saved_inside_a_character_goes_on_with_it_whole(
    home: Path,
    tmp_path: Path,
    run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = iter("é🙂!".encode())
    monkeypatch.setattr(Sampling, "draw", lambda *_: torch.tensor([next(written)]))
    argv, state = ["generate", home / "states"], tmp_path / "a.state"
    first = run(*argv, "--prompt", "caf", "--max-new-tokens", "1", "--save-state", state)
    assert first.code == 0 and first.out == "caf\ufffd\n"
    more = [*argv, "--load-state", state, "--save-state", state, "--max-new-tokens"]
    assert run(*more, "2").out == "é\ufffd\n"
    assert run(*more, "2").out == "\ufffd\n"
    assert run(*more, "2").out == "🙂!\n"
