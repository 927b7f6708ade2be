"""Llama-style checkpoints of transformers in our model and back: the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from statewright.models.load import load, save_as

torch.set_num_threads(1)
BASE = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS = {
    "llama": LlamaConfig(**BASE),
    "llama-tied": LlamaConfig(**BASE, tie_word_embeddings=True, head_dim=16, attention_bias=True),
    "llama3": LlamaConfig(**BASE, rope_parameters=LLAMA3),
    "linear": LlamaConfig(
        **BASE, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
    ),
    "mistral": MistralConfig(**BASE, sliding_window=11, head_dim=8),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=8, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers_and_the_way_back(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load(tmp_path / "theirs")
        ids = torch.randint(0, 40, (2, 90), generator=torch.Generator().manual_seed(1))
        want = theirs(ids).logits
        assert (ours(ids).logits - want).abs().max() < 1e-5 * want.abs().max()
        first = ours(ids[:, :37])
        rest = ours(ids[:, 37:], state=first.state).logits
        assert (rest - want[:, 37:]).abs().max() < 1e-5 * want.abs().max()
        save_as(ours, "hf", tmp_path / "back")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert type(back) is type(theirs)
        assert torch.equal(back(ids).logits, want)


def test_layers_with_and_without_a_window(tmp_path) -> None:
    torch.manual_seed(0)
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    config = Qwen2Config(**BASE, use_sliding_window=True, sliding_window=9, layer_types=types)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = load(tmp_path), torch.arange(60).remainder(40).view(1, -1)
    with torch.no_grad():
        out = ours(ids)
        torch.testing.assert_close(out.logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    assert [layer.k.shape[2] for layer in out.state.layers] == [60, 8, 8]
    with pytest.raises(ValueError, match="layers differ"):
        save_as(ours, "hf", tmp_path / "back")


def test_what_we_do_not_build_is_refused(tmp_path) -> None:
    rope = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0)
    LlamaConfig(**BASE, rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_type='yarn' is not supported"):
        load(tmp_path)
