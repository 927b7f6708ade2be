"""`statewright generate` under every recurrent policy, with every mixer and a hybrid: it works, or
one line says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_cli import run  # noqa: F401

from statewright.mixers import MIXERS
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.policies import POLICIES, RecurrentPolicy

RECURRENT = [name for name, cls in POLICIES.items() if issubclass(cls, RecurrentPolicy)]
# A number for what a fresh model has not measured; the rest of each policy is its default.
SPECS = {
    "statenorm": ["statenorm", "statenorm:limit=1:every=2"],
    "deltascale": ["deltascale:factor=0.5", "deltascale:factor=0.9/0.5"],
    "statewindow": ["statewindow:length=3"],
}
HYBRIDS = {"hybrid": ["mingru", "attention"], "two kinds": ["mamba2", "gla"]}


def works(name: str, spec: str) -> bool:
    """Some layer must be linear; a step size must be there to be scaled."""
    linear = [MIXERS[mixer] for mixer in HYBRIDS.get(name, [name]) if MIXERS[mixer].is_linear]
    if spec.startswith("deltascale"):
        return bool(linear) and all(getattr(mixer, "has_delta", False) for mixer in linear)
    return bool(linear)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mixers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=64, num_hidden_layers=2)
    for name, mixer in {**{name: name for name in MIXERS}, **HYBRIDS}.items():
        model = StatewrightForCausalLM(StatewrightConfig(**sizes, mixer=mixer))
        model.save_pretrained(home / name)
        byte_tokenizer().save_pretrained(home / name)
    return home


@pytest.mark.parametrize("policy", RECURRENT)
@pytest.mark.parametrize("name", [*MIXERS, *HYBRIDS])
def test_it_works_or_is_one_line(name: str, policy: str, home: Path, run) -> None:  # noqa: F811
    for spec in SPECS.get(policy, [policy]):
        greedy = ["--prompt", "abcdef", "--max-new-tokens", "3", "--temperature", "0"]
        ran = run("generate", home / name, "--policy", spec, *greedy)
        assert "Traceback" not in ran.err and (ran.code == 0) == works(name, spec), ran.err
        if ran.code == 0:
            assert ran.out.startswith("abcdef") and f"policy {policy}" in ran.err
            continue
        last = ran.err.strip().splitlines()[-1]
        assert ran.out in ("", "abcdef") and (policy in last or "policy" in last), ran.err
