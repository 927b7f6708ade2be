"""Shell completion, as the shells ask for it: verbs, specs and their options, without torch."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class

from statewright.catalog import BOUNDS, MIXERS, POLICIES, TASKS
from statewright.cli import cli


def completed(*words: str, shell: str = "zsh") -> list[str]:
    """What a shell is told when Tab is pressed at the end of the last word."""
    complete = get_completion_class(shell)(cli, {}, "statewright", "_STATEWRIGHT_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]


def test_verbs() -> None:
    assert set(completed("re")) == {"repair", "report", "resize"}
    assert completed("state", "sh") == ["show"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_every_shell(shell: str, monkeypatch, capsys) -> None:
    """The page's lines print a script that asks for completions by the same variable."""
    page = Path(__file__).parents[1].joinpath("docs", "completion.md").read_text()
    assert f"_STATEWRIGHT_COMPLETE={shell}_source statewright" in page
    if shell != "bash":  # whose version click asks
        monkeypatch.setenv("_STATEWRIGHT_COMPLETE", f"{shell}_source")
        with pytest.raises(SystemExit) as ended:
            cli.main([], prog_name="statewright")
        assert ended.value.code == 0
        assert f"_STATEWRIGHT_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_specs_complete_by_name_and_option() -> None:
    asked = {
        ("train", "--mixer"): MIXERS,
        ("eval", "m", "--task"): TASKS,
        ("eval", "m", "--policy"): BOUNDS,
    }
    for words, registry in asked.items():
        none = ["none"] if "--policy" in words else []
        assert completed(*words, "") == [*none, *registry]
    assert completed("generate", "m", "--policy", "to") == ["tova"]
    found = completed("generate", "m", "--policy", "h2o:budget=8:")
    assert found == [f"h2o:budget=8:{name}=" for name in POLICIES.options("h2o")]
    chain = completed("generate", "m", "--policy", "forgetmore+stat")
    assert chain == ["forgetmore+statenorm", "forgetmore+statewindow"]
    assert completed("generate", "m", "--policy", "unknown:") == []


def test_families_prompts_and_models() -> None:
    assert completed("check", "--family", "mamba2") == ["mamba2"]
    assert completed("diagnose", "m", "--prompts", "text,ran") == ["text,random"]
    assert "smollm2-135m" in completed("size", "smol")
    assert completed("train", "--tokenizer", "by")[0] == "bytes"


def test_every_spec_and_name_completes() -> None:
    """Whatever the value of an option is chosen from, the shell can offer."""
    from test_cli_mistakes import verbs

    from statewright.cli.types import Model, Names, Spec

    for path, verb in verbs():
        for parameter in verb.params:
            if isinstance(parameter.type, Spec | Names | Model):
                context = click.Context(verb, info_name=path[-1])
                assert parameter.type.shell_complete(context, parameter, ""), (path, parameter)
