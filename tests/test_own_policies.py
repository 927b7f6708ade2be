"""A policy class of the user's own: states under it are saved, loaded and named by import path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from statewright.cli import main
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.policies import build_policy, policy_spec
from statewright.session import Session
from statewright.state_file import read_state_file

OWN = """
from dataclasses import dataclass
from statewright.policies import Window

@dataclass(frozen=True)
class Mine(Window):
    extra: int = 3
"""
SPEC = "own_policies:Mine:budget=6:sinks=1"


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A working directory with a module of one policy and a model that keeps lists."""
    (tmp_path / "own_policies.py").write_text(OWN)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = StatewrightConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, mixer="attention"
    )
    StatewrightForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_policies", None)


def test_the_command_line_names_it_saves_under_it_and_goes_on(place: Path, capsys) -> None:
    read = ["generate", "model", "--max-new-tokens", "0", "--save-state"]
    assert main([*read, "a.state", "--prompt", "a word and one more", "--policy", SPEC]) == 0
    assert read_state_file("a.state").policy == SPEC
    sys.modules.pop("own_policies")
    # A file names the class: that runs nothing.
    assert main([*read, "b.state", "--load-state", "a.state"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "'own_policies:Mine'; its module is not imported" in said
    assert f"made under --policy {SPEC}" in said
    assert "own_policies" not in sys.modules and not Path("b.state").exists()
    go_on = ["--load-state", "a.state", "--prompt", "!", "--policy", SPEC]
    assert main([*read, "b.state", *go_on]) == 0
    assert read_state_file("b.state").state.seen.tolist() == [20]
    assert main([*read, "c.state", *go_on[:-1], SPEC.replace("budget=6", "budget=5")]) == 1
    assert f"made under policy {SPEC}, not" in capsys.readouterr().err.splitlines()[-1]


def test_in_python_the_file_s_own_spec_suffices_once_the_class_is_there(place: Path) -> None:
    sys.path.insert(0, str(place))
    import own_policies

    sys.path.remove(str(place))
    policy = own_policies.Mine(budget=6, extra=4)
    assert policy_spec(policy) == "own_policies:Mine:budget=6:extra=4"
    assert build_policy(policy_spec(policy)) == policy
    model = StatewrightForCausalLM.from_pretrained("model").eval()
    session = Session(model, policy)
    session.feed(torch.arange(12))
    session.save("a.state")
    for given in (None, policy, policy_spec(policy)):
        again = Session.load("a.state", model, given)
        assert again.policy == policy
        assert torch.equal(again.fork().generate(5), session.fork().generate(5))


def test_a_class_that_no_path_names_is_given_itself(place: Path) -> None:
    from dataclasses import dataclass

    from statewright.policies import Window

    @dataclass(frozen=True)
    class Local(Window):
        pass

    model = StatewrightForCausalLM.from_pretrained("model").eval()
    session = Session(model, Local(budget=5))
    session.feed(torch.arange(12))
    session.save("a.state")
    assert Session.load("a.state", model, Local(budget=5)).policy == Local(budget=5)
    with pytest.raises(ValueError, match="made under --policy test_own_policies:test_a"):
        Session.load("a.state", model)


def test_a_config_that_names_a_module_runs_nothing(place: Path, capsys) -> None:
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policy": SPEC}))
    assert main(["size", "model"]) == 1
    assert "its module is not imported" in capsys.readouterr().err
    assert "own_policies" not in sys.modules
