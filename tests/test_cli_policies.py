"""`statewright generate` under policies, with our models and transformers', as typed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded_models import CONFIGS, random_model
from test_cli import Ran, assert_refused
from transformers import AutoConfig

from statewright.cli import main
from statewright.hf import hub
from statewright.hf.families import FAMILIES
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer, load_tokenizer
from statewright.state import KVState
from statewright.state_file import read_state_file

TEXT = "Seven green bottles, standing on a wall; and if one of them falls, " * 3
OURS = {"attention": "attention:num_heads=2", "mingru": "mingru", "bounded": "attention"}


@pytest.fixture
def run(capsys):
    return lambda *argv: Ran(capsys, *argv)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models with random weights: ours; a Llama, which we read as ours; Qwen3 and Mamba-2 layers
    that only transformers runs."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = byte_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    for name, mixer in OURS.items():
        policy = "window:budget=6" if name == "bounded" else None
        config = StatewrightConfig(**sizes, mixer=mixer, policy=policy)
        torch.manual_seed(1)  # greedy writing meets no end of text
        StatewrightForCausalLM(config).save_pretrained(home / name)
    for name in ("llama", "gpt_neox"):
        config = CONFIGS[name]()
        config.vocab_size = len(tokenizer)
        random_model(config).float().save_pretrained(home / name)
    config = AutoConfig.for_model("falcon_mamba", **FAMILIES["falcon_mamba"])
    config.vocab_size = len(tokenizer)
    random_model(config).float().save_pretrained(home / "falcon_mamba")
    for directory in home.iterdir():
        tokenizer.save_pretrained(directory)
    return home


def slots(path: Path) -> set[int]:
    layers = read_state_file(path).state.layers
    return {part.pos.shape[-1] for part in layers if isinstance(part, KVState)}


@pytest.mark.parametrize("name", ["attention", "llama", "gpt_neox"])
def test_bounded_generation_goes_on(name: str, home: Path, tmp_path: Path, run) -> None:
    """Two halves over a file are the whole, and the file says under which policy it was made."""
    states = [tmp_path / f"{i}.state" for i in range(3)]
    common = ["generate", home / name, "--policy", "tova:budget=12", "--chunk", "8"]
    greedy = ["--temperature", "0", "--max-new-tokens"]
    first = run(*common, "--prompt", TEXT, *greedy, "8", "--save-state", states[0])
    assert first.code == 0 and "policy tova:budget=12\n" in first.err, first.err
    then = ["generate", home / name, "--load-state", states[0], *greedy, "9"]
    last = run(*then, "--save-state", states[1])
    assert last.code == 0 and ", under tova:budget=12" in last.err
    whole = run(*common, "--prompt", TEXT, *greedy, "17", "--save-state", states[2])
    assert whole.code == 0 and whole.out.startswith(first.out[:100])
    assert run("state", "diff", states[1], states[2]).code == 0
    assert slots(states[2]) == {12} and "tova:budget=12" in run("state", "show", states[0]).out
    other = [*then, "--policy", "window:budget=4", "--save-state", states[1]]
    named = "under policy tova:budget=12, not window:budget=4", "--change-policy"
    assert_refused(run(*other), *named)
    assert run(*other, "--change-policy").code == 0
    assert slots(states[1]) == {4} and read_state_file(states[1]).policy == "window:budget=4"


@pytest.mark.parametrize("name", ["attention", "gpt_neox"])
def test_budgets_in_bytes(name: str, home: Path, tmp_path: Path, run) -> None:
    path = tmp_path / "a.state"
    argv = ["generate", home / name, "--prompt", TEXT, "--save-state", path]
    ran = run(*argv, "--policy", "window:budget=16KiB:sinks=2")
    assert ran.code == 0 and "policy window:budget=16KiB:sinks=2" in ran.err
    layers = read_state_file(path).state.layers
    held = sum(t.nbytes for p in layers for t in (p.k, p.v, p.pos, p.seen))
    assert 12 * 1024 < held <= 16 * 1024


def test_the_configs_policy_is_announced(home: Path, tmp_path: Path, run) -> None:
    path = tmp_path / "a.state"
    argv = ["generate", home / "bounded", "--prompt", TEXT, "--max-new-tokens", "3"]
    ran = run(*argv, "--save-state", path)
    assert ran.code == 0 and "Warning" not in ran.err and slots(path) == {6}
    assert "policy window:budget=6 (the config's default; --policy none lifts it)" in ran.err
    ran = run(*argv, "--save-state", path, "--policy", "none")
    assert ran.code == 0 and "policy " not in ran.err and slots(path) == {len(TEXT) + 3}
    ran = run("generate", home / "bounded", "--load-state", path, "--save-state", path)
    assert ran.code == 0 and min(slots(path)) > len(TEXT) + 3


def test_recurrent_policies(home: Path, tmp_path: Path, run) -> None:
    argv = ["generate", home / "mingru", "--prompt", TEXT, "--max-new-tokens", "0"]
    free = run(*argv, "--save-state", tmp_path / "a.state")
    policy = ["--policy", "forgetmore:decay=0.5"]
    under = run(*argv, *policy, "--save-state", tmp_path / "b.state")
    assert free.code == under.code == 0 and "policy forgetmore:decay=0.5\n" in under.err
    a, b = (read_state_file(tmp_path / f"{n}.state").state.layers[0].h for n in "ab")
    assert b.norm() < 0.9 * a.norm()


def test_what_transformers_must_be_told_is_one_line(home: Path, run) -> None:
    ran = run("generate", home / "falcon_mamba", "--prompt", TEXT, "--max-new-tokens", "3")
    assert ran.code == 0 and "Warning" not in ran.err
    notes = " ".join(ran.err.split())
    assert "note: " in notes and "fed token by token, slower" in notes


REFUSED: dict[str, Any] = {
    "unknown": ("attention", ["--policy", "tovaa:budget=4"], "did you mean 'tova'?"),
    "option": ("attention", ["--policy", "tova:budge=4"], "did you mean 'budget'?"),
    "floor": ("gpt_neox", ["--policy", "window:budget=4:sinks=4"], "expected at least 5 tokens"),
    "bytes": ("gpt_neox", ["--policy", "tova:budget=100B"], "bytes per layer"),
    "no list": ("mingru", ["--policy", "tova:budget=4"], "this model has none"),
    "no list there": ("falcon_mamba", ["--policy", "tova:budget=4"], "FalconMambaForCausalLM has"),
    "recurrent": ("attention", ["--policy", "forgetmore"], "acts on the state of a linear"),
    "recurrent there": ("gpt_neox", ["--policy", "forgetmore"], "statewright convert"),
    "nothing to change": ("attention", ["--change-policy"], "--change-policy needs --load-state"),
}


@pytest.mark.parametrize("name, argv, reason", REFUSED.values(), ids=REFUSED.keys())
def test_bad_policies(name: str, argv: list[str], reason: str, home: Path, run) -> None:
    ran = run("generate", home / name, "--prompt", "x", *argv)
    lines = [line for line in ran.err.splitlines() if line.startswith("statewright: ")]
    # A spec that says nothing is a mistake of usage; one that this model cannot take is not.
    assert ran.code == (2 if "did you mean" in reason else 1)
    assert ran.out == "" and "Traceback" not in ran.err
    assert len(lines) == 1 and reason in lines[0], ran.err


@pytest.mark.parametrize("offline", [True, False])
def test_names_that_nobody_has_are_refused_at_once(offline: bool, tmp_path, monkeypatch) -> None:
    """Without a network transformers would try for most of a minute."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked: list[str] = []

    def unreachable(self: Any, name: str, timeout: float) -> None:
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", unreachable)
    began = time.perf_counter()
    for name in ("no-such", "org/no-such", "./no-such", "a/b/c"):
        with pytest.raises(ValueError, match="neither bytes, characters, a directory nor an id"):
            load_tokenizer(name)
        assert main(["generate", name, "--prompt", "x"]) == 2
    with pytest.raises(ValueError, match="did you mean 'characters'"):
        load_tokenizer("character")
    assert time.perf_counter() - began < 5
    assert len(asked) == (0 if offline else 5)
    assert asked == [] or set(asked) == {"no-such", "org/no-such", "character"}
