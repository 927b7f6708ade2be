"""Tiny random decoders of transformers for the tests of BoundedCache."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

BASE = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(**BASE, num_key_value_heads=2)
WIDE = dict(**GROUPED, head_dim=8)
TYPES = ["sliding_attention", "full_attention"]
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
# Sliding windows longer than the tests' texts, except in the tests that are about them.
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=100),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**WIDE),
    "gemma": lambda: GemmaConfig(**WIDE),
    "gemma2": lambda: Gemma2Config(**WIDE, sliding_window=100, attn_logit_softcapping=0.5),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, sliding_window=100, layer_types=TYPES),
    "gpt_neox": lambda: GPTNeoXConfig(**BASE),
    "gpt2": lambda: GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS
    ),
    "opt": lambda: OPTConfig(**_without(BASE, "intermediate_size"), ffn_dim=48),
    "phi": lambda: PhiConfig(**BASE),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "smollm3": lambda: SmolLM3Config(**GROUPED),
    "gpt_oss": lambda: GptOssConfig(
        **WIDE,
        sliding_window=100,
        layer_types=TYPES,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
}


def _without(options: dict, *names: str) -> dict:
    return {key: value for key, value in options.items() if key not in names}


@cache
def tiny(name: str, attention: str = "eager", **changes: int) -> PreTrainedModel:
    """float64 where the model can; weights large enough that attention is far from uniform."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return random_model(config, attention, torch.float32 if name == "gpt_oss" else torch.float64)


def random_model(config, attention: str = "eager", dtype=torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "A_log" not in name:
                parameter.normal_(0, 0.3)
            if "sinks" in name:
                parameter.normal_()
            if "k_norm" in name:
                # Otherwise all keys of a head are equally long, and KeyNorm has no choice.
                parameter.normal_(1, 0.3)
    return model


def text(rows: int = 1, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
