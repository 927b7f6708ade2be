"""--json on every verb that shows something: one JSON value on stdout and nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_mistakes import verbs
from test_train import one_thread  # noqa: F401

import statewright.bench.scans
from statewright.cli import main
from statewright.cli.show import plain
from statewright.hf import fetch as fetching
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer

TEXT = "seven green bottles, standing on a wall; " * 40
# A name with what rich would take for markup.
MODEL, POLICY = "a[/b]c", "window:budget=8:sinks=4"


@pytest.fixture(scope="module")
def home(one_thread, tmp_path_factory) -> Path:  # noqa: F811
    """A Transformer and a recurrent model of ours, a text, a state, a result, a trace."""
    home = tmp_path_factory.mktemp("json[bold]")
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2}
    mixers = {MODEL: "attention:num_heads=2", "rnn": "mamba2:state_size=4:head_dim=8"}
    for name, mixer in mixers.items():
        torch.manual_seed(1)
        model = StatewrightForCausalLM(StatewrightConfig(**sizes, mixer=mixer))
        model.config.train_context = 32
        place = home.joinpath(*name.split("/"))
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    (home / "text.txt").write_text(TEXT)
    return home


def _state(home: Path) -> list[str]:
    path = home / "a.state"
    if not path.exists():
        asked = ["--prompt", "seven", "--max-new-tokens", "0", "--save-state", str(path)]
        assert main(["generate", str(home / MODEL), *asked, "--policy", POLICY]) == 0
    return [str(path)]


def _eval(home: Path) -> list[str]:
    asked = ["--task", "passkey:length=512", "--policy", POLICY, "-n", "1"]
    return [str(home / MODEL), *asked]


def _report(home: Path) -> list[str]:
    path = home / "trace.json"
    if not path.exists():
        assert main(["trace", *_trace(home)]) == 0
    return [str(path), "--out", str(home / "page.html")]


def _trace(home: Path) -> list[str]:
    common = ["--text", str(home / "text.txt"), "--length", "24"]
    return [str(home / MODEL), *common, "--policy", POLICY, "--output", str(home / "trace.json")]


def _recurrent(home: Path) -> list[str]:
    return [str(home / "rnn"), "--text", str(home / "text.txt"), "--train-length", "16"]


ASKED: dict[str, Callable[[Path], list[str]]] = {
    "list": lambda home: [],
    "models": lambda home: [],
    "models get": lambda home: ["smollm2-135m"],
    "data": lambda home: [str(home / "text.txt"), "--output-dir", str(home / "tokens")],
    "size": lambda home: [str(home / MODEL)],
    "check": lambda home: [str(home / "rnn"), "--only", "fold,fork"],
    "state show": _state,
    "state diff": lambda home: _state(home) * 2,
    "eval": _eval,
    "trace": _trace,
    "report": _report,
    "diagnose": lambda home: [*_recurrent(home), "--length", "128", "--prompts", "text"],
    "repair": lambda home: [
        *(*_recurrent(home), "--length", "64", "--only", "forgetmore", "--rows", "1"),
        *("--output-dir", str(home / "fixed")),
    ],
    "resize": lambda home: [str(home / "rnn"), "--layers", "all", "--dry-run"],
    "convert": lambda home: [
        *(str(home / "rnn"), "--to", "statewright"),
        *("--output-dir", str(home / "ours")),
    ],
    "bench": lambda home: ["--suite", "scans", "--quick", "--threads", "1"],
}
# Shows what lm-eval found; its own test needs the package.
ELSEWHERE = {"lm-eval"}


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path: Path) -> None:
    scans = statewright.bench.scans
    monkeypatch.setattr(scans, "cases", lambda quick: [scans.forward(2, 16, 4)])
    from statewright.bench import protocol

    plain_measure = protocol.measure
    monkeypatch.setattr(protocol, "measure", lambda c, n, seconds: plain_measure(c, n, 0.0))
    monkeypatch.setattr(fetching, "fetch", lambda name: (tmp_path / name, True))


def test_every_verb_that_shows_something_is_here() -> None:
    known = {" ".join(path) for path, verb in verbs() if "as_json" in {p.name for p in verb.params}}
    assert known == ASKED.keys() | ELSEWHERE


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("verb", ASKED)
def test_json_is_all_that_stdout_holds(verb: str, home: Path, capsys) -> None:
    argv = ASKED[verb](home)
    if verb in ("data", "repair", "convert"):
        argv[-1] += ".json"
    capsys.readouterr()
    assert main([*verb.split(), *argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("}\n") or out.endswith("]\n")
    assert _strict(out)


@pytest.mark.parametrize("verb", ASKED)
def test_words_and_tables_break_no_name(verb: str, home: Path, capsys, monkeypatch) -> None:
    """Nor take one for markup, nor cut anything, at 60 columns and without colour."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    argv = ASKED[verb](home)
    if verb in ("data", "repair", "convert"):
        argv[-1] += ".words"
    capsys.readouterr()
    assert main([*verb.split(), *argv]) == 0
    out = capsys.readouterr().out
    assert out and "\x1b" not in out and "…" not in out
    assert not re.search(r"\b1 (runs|tokens|rows|files|threads|samples)\b", out), out
    assert not re.search(r"\[(['\"]|\d+[,\]])", out), out
    for name in (MODEL, POLICY, str(home)):
        broken = "".join(out.split())
        assert broken.count(name.replace(" ", "")) == out.count(name)
    if verb in ("eval", "trace", "size", "state show") and POLICY in " ".join(argv):
        assert POLICY in out or verb == "trace"


def test_plain_is_json(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": (1, math.inf), "c": tmp_path, 4: torch.tensor(3), "e": {1.5}}
    assert plain(value) == {"a": None, "b": [1, None], "c": str(tmp_path), "4": 3, "e": [1.5]}
