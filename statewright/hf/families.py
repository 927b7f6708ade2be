"""Tiny random models of every stateful family of transformers, by name: no download, no training.

A family's state either works or it does not, whatever the weights; a model of two to four narrow
layers shows it in a second. Weights are drawn wide enough that ignoring the state changes the
logits by about one.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch

VOCABULARY = 64
_WIDTH = 32
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {**_PURE, "state_size": 8, "conv_kernel": 4, "expand": 2}
_SSD = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_LINEAR_AND_FULL = ["linear_attention", "full_attention", "linear_attention"]

# family -> the options that make it tiny; the rest is the family's own default.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": _WIDTH,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 4096,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {**_COMMON, "sliding_window": 24},
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma3_text": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": {
        **_COMMON,
        **_MLA,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": {**_MAMBA, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 16},
    "jamba": {
        **_COMMON,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
    },
    "zamba": {
        **_COMMON,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "tie_word_embeddings": True,
    },
    "zamba2": {
        **_COMMON,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "tie_word_embeddings": True,
    },
    "bamba": {**_COMMON, **_SSD, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_COMMON,
        **_SSD,
        "layer_types": _LINEAR_AND_FULL,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**_COMMON, **_SSD, "mamba_d_ssm": 64},
    "nemotron_h": {
        **{k: v for k, v in _COMMON.items() if k != "num_hidden_layers"},
        "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "qwen3_next": {
        **_COMMON,
        **_DELTA,
        "head_dim": 8,
        "layer_types": _LINEAR_AND_FULL,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_5_text": {**_COMMON, **_DELTA, "head_dim": 8, "layer_types": _LINEAR_AND_FULL},
    "olmo_hybrid": {**_COMMON, **_DELTA, "layer_types": _LINEAR_AND_FULL},
    "kimi_linear": {
        **_COMMON,
        **_MLA,
        "layer_types": _LINEAR_AND_FULL,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "bailing_hybrid": {
        **_COMMON,
        **_MLA,
        "head_dim": 8,
        "layer_types": _LINEAR_AND_FULL,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
    },
    "zaya": {
        **_COMMON,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "router_hidden_size": 16,
    },
    "lfm2": {
        **_COMMON,
        "block_multiple_of": 16,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "minimax": {
        **_COMMON,
        "head_dim": 8,
        "layer_types": _LINEAR_AND_FULL,
        "block_size": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    # xLSTM's kernels want widths that are multiples of 64.
    "xlstm": {**_PURE, "hidden_size": 128, "num_heads": 2, "qk_dim_factor": 1.0, "chunk_size": 16},
    "rwkv": {**_PURE, "context_length": 4096, "rescale_every": 0},
    "recurrent_gemma": {**_COMMON, "attention_window_size": 24, "lru_width": _WIDTH},
}


def tiny_config(family: str, **options: Any) -> Any:
    """The config of a tiny model of `family`; `options` override the family's.

    Raises ValueError for a family that is not in the list or that the installed transformers
    lacks.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if family not in FAMILIES:
        close = difflib.get_close_matches(family, FAMILIES, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown family {family!r}{guess} (known: {', '.join(FAMILIES)})")
    if family not in CONFIG_MAPPING:
        raise ValueError(f"transformers {__version__} has no family {family!r}")
    return AutoConfig.for_model(family, **{**FAMILIES[family], **options})


def tiny(family: str, seed: int = 0, **options: Any) -> Any:
    """A random model of `family` in evaluation mode, float32, the same for the same seed.

    Raises ValueError as `tiny_config` does.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _widen(model)
    return model.float().eval()


@torch.no_grad()
def _widen(model: torch.nn.Module) -> None:
    """Scale matrices that an initialisation left near zero up to standard deviation 0.15."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and 0 < parameter.std() < 0.1:
            parameter.mul_(0.15 / parameter.std())
