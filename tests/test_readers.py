"""Readers of a model's outputs and weights: tuples by config, and layers without float weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bounded_models import CONFIGS, random_model
from test_cli import run  # noqa: F401
from torch import nn

from statewright import diagnose, evaluate
from statewright.checks.runner import runner_of
from statewright.models import StatewrightConfig, StatewrightForCausalLM, load
from statewright.models.tokenizers import byte_tokenizer
from statewright.precision import device_of, dtype_of
from statewright.session import Session

KINDS = ("ours", "theirs")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose config asks for tuples."""
    home, tokenizer = tmp_path_factory.mktemp("tuples"), byte_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    torch.manual_seed(0)
    ours = StatewrightForCausalLM(StatewrightConfig(**sizes, mixer="mamba2:head_dim=16"))
    config = CONFIGS["gpt_neox"]()
    config.vocab_size = len(tokenizer)
    for name, model in (("ours", ours), ("theirs", random_model(config).float())):
        model.config.return_dict = False
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        assert json.loads((home / name / "config.json").read_text())["return_dict"] is False
    (home / "text.txt").write_text("Seven green bottles, standing on a wall. " * 30)
    return home


VERBS = {
    "generate": ["--prompt", "abc", "--max-new-tokens", "2", "--temperature", "0"],
    "check": [],
    "eval": ["--task", "passkey:length=256"],
    "trace": ["--text", "{home}/text.txt", "--length", "40", "--output", "{new}/t.json"],
    "diagnose": ["--text", "{home}/text.txt", "--train-length", "32", "--length", "128"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_reads_a_model_that_gives_tuples(
    verb: str,
    kind: str,
    home: Path,
    tmp_path: Path,
    run,  # noqa: F811
) -> None:
    words = [word.format(home=home, new=tmp_path) for word in VERBS[verb]]
    ran = run(verb, home / kind, *words)
    assert "Traceback" not in ran.err and "tuple" not in ran.err, ran.err
    if (verb, kind) != ("diagnose", "theirs"):
        assert ran.code == 0, ran.err


def test_a_users_own_model_may_give_tuples(home: Path) -> None:
    """Ours; every one of transformers' own fails under such a config, whoever calls it (5.23)."""
    model = StatewrightForCausalLM.from_pretrained(home / "ours").eval()
    ids = torch.arange(3, 12).unsqueeze(0)
    assert isinstance(model(ids), tuple)
    session = Session(model)
    session.feed(ids)
    reader = runner_of(model)
    logits, _ = reader.read(ids)
    assert torch.allclose(session.logits, logits[:, -1], atol=1e-5)
    assert torch.allclose(reader.packed(ids, torch.arange(9).unsqueeze(0)), logits, atol=1e-5)
    text = (home / "text.txt").read_text()
    assert diagnose(model, text, 32, byte_tokenizer()).text.reading.in_window > 0
    for task in ("perplexity:length=64:text=" + str(home / "text.txt"), "mqar:pairs=2:length=8"):
        small = {"vocab": 20, "first": 3} if task.startswith("mqar") else {}
        spec = ":".join([task, *(f"{k}={v}" for k, v in small.items())])
        assert evaluate(model, byte_tokenizer(), spec, n=2).n == 2
    assert model.config.return_dict is False and isinstance(model(ids), tuple)


def test_what_a_model_computes_in_is_not_what_it_is_stored_as(home: Path) -> None:
    class Stored(nn.Module):
        def __init__(self, *kinds: torch.dtype) -> None:
            super().__init__()
            for i, dtype in enumerate(kinds):
                stored = nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False)
                self.register_parameter(f"w{i}", stored)

    assert dtype_of(Stored(torch.int8, torch.float8_e4m3fn, torch.bfloat16)) == torch.bfloat16
    assert dtype_of(Stored(torch.int8)) == dtype_of(nn.Identity()) == torch.float32
    assert device_of(Stored(torch.int8).to("meta")).type == "meta"
    assert device_of(nn.Identity()).type == "cpu"


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_models_are_read(kind: str, home: Path, tmp_path: Path) -> None:
    from statewright.hf.loading import load_causal_lm

    plain = (load if kind == "ours" else load_causal_lm)(home / kind, torch.float32)
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert dtype_of(model) == torch.float32
    ids = torch.arange(9).unsqueeze(0)
    logits = runner_of(model).read(ids)[0]
    assert (logits - plain(ids, return_dict=True).logits).norm() < 0.2 * logits.norm()
    if kind == "ours":
        session = Session(model)
        session.feed(ids)
        assert session.generate(3).shape == (1, 3)
