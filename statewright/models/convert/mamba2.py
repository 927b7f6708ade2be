"""Mamba-2: transformers' `mamba2` and the original `state-spaces` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statewright.mixers import Mamba2
from statewright.models.config import StatewrightConfig
from statewright.models.convert.family import (
    Family,
    Renaming,
    Tensors,
    common_out,
    expect,
    needed,
    number_in,
    number_out,
    shared,
    whole,
)
from statewright.spec import format_spec

_MIXER = ["in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias", "norm.weight"]
_MIXER += ["dt_bias", "A_log", "D"]
BACKBONE = [
    ("backbone.embeddings.weight", "model.embeddings.weight"),
    ("backbone.embedding.weight", "model.embeddings.weight"),
    ("backbone.norm_f.weight", "model.norm.weight"),
    ("backbone.layers.{}.norm.weight", "model.layers.{}.norm.weight"),
    ("backbone.layers.{}.mixer.conv1d.weight", "model.layers.{}.mixer.conv.weight"),
    ("backbone.layers.{}.mixer.conv1d.bias", "model.layers.{}.mixer.conv.bias"),
]
_NAMES = Renaming(
    BACKBONE + [(f"backbone.layers.{{}}.mixer.{n}", f"model.layers.{{}}.mixer.{n}") for n in _MIXER]
)


def bare_block(**options: Any) -> StatewrightConfig:
    """norm -> mixer -> residual, nothing else: the block of the Mamba papers."""
    return StatewrightConfig(conv_kernel=0, mlp_ratio=0.0, norm="rmsnorm", **options)


def config_in(config: Mapping[str, Any]) -> StatewrightConfig:
    """From transformers' Mamba2Config as a dict; ValueError for what we do not build."""
    expect(config, "mamba2", hidden_act=("silu", "swish"), rms_norm=True)
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "num_heads")
    D, L, vocabulary, state_size, num_heads = needed(config, "mamba2", *names)
    head_dim, expand = config.get("head_dim", 64), config.get("expand", 2)
    if num_heads * head_dim != int(expand * D):
        raise ValueError(
            f"mamba2: num_heads={num_heads} x head_dim={head_dim} is not "
            f"expand={expand} x hidden_size={D}"
        )
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    eps = config.get("layer_norm_epsilon", 1e-5)
    options = {
        "state_size": state_size,
        "head_dim": head_dim,
        "expand": float(expand),
        "num_groups": config.get("n_groups", 8),
        "conv_kernel": config.get("conv_kernel", 4),
        "dt_min": number_in(low),
        "dt_max": number_in(high),
        "bias": bool(config.get("use_bias", False)),
        "conv_bias": bool(config.get("use_conv_bias", True)),
        "eps": eps,
    }
    return bare_block(
        mixer=format_spec("mamba2", options, Mamba2),
        hidden_size=D,
        num_hidden_layers=L,
        vocab_size=vocabulary,
        norm_eps=eps,
        **shared(config),
    )


def config_out(config: StatewrightConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **common_out(config),
        "state_size": options["state_size"],
        "head_dim": options["head_dim"],
        "num_heads": int(options["expand"] * config.hidden_size) // options["head_dim"],
        "expand": whole(options["expand"], "expand"),
        "n_groups": options["num_groups"],
        "conv_kernel": options["conv_kernel"],
        "time_step_limit": [number_out(options["dt_min"]), number_out(options["dt_max"])],
        "use_bias": options["bias"],
        "use_conv_bias": options["conv_bias"],
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "residual_in_fp32": True,
    }


def weights_in(tensors: Tensors) -> Tensors:
    """Their names to ours; the convolution's (C, 1, W) to (C, W)."""
    return rename_in(tensors, _NAMES)


def weights_out(tensors: Tensors) -> Tensors:
    return rename_out(tensors, _NAMES)


def rename_in(tensors: Tensors, names: Renaming) -> Tensors:
    found = {names.ours(name): t for name, t in tensors.items()}
    conv = ".mixer.conv.weight"
    return {n: t.squeeze(1) if n.endswith(conv) and t.dim() == 3 else t for n, t in found.items()}


def rename_out(tensors: Tensors, names: Renaming) -> Tensors:
    conv = ".mixer.conv.weight"
    wide = {n: t.unsqueeze(1) if n.endswith(conv) else t for n, t in tensors.items()}
    return {names.theirs(name): t.contiguous() for name, t in wide.items()}


FAMILY = Family("mamba2", "hf", "mamba2", config_in, config_out, weights_in, weights_out)
