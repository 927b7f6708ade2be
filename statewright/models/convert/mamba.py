"""Mamba: transformers' `mamba` and the original `state-spaces` names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from statewright.mixers import Mamba
from statewright.models.config import StatewrightConfig
from statewright.models.convert.family import (
    Family,
    Renaming,
    Tensors,
    common_out,
    expect,
    needed,
    shared,
    whole,
)
from statewright.models.convert.mamba2 import BACKBONE, bare_block, rename_in, rename_out
from statewright.spec import format_spec

_MIXER = ["in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias", "x_proj.weight"]
_MIXER += ["dt_proj.weight", "dt_proj.bias", "A_log", "D"]
_NAMES = Renaming(
    BACKBONE + [(f"backbone.layers.{{}}.mixer.{n}", f"model.layers.{{}}.mixer.{n}") for n in _MIXER]
)


def config_in(config: Mapping[str, Any]) -> StatewrightConfig:
    """From transformers' MambaConfig as a dict; ValueError for what we do not build."""
    expect(config, "mamba", hidden_act=("silu", "swish"), rms_norm=True, use_mambapy=False)
    D, L, vocabulary = needed(config, "mamba", "hidden_size", "num_hidden_layers", "vocab_size")
    rank = config.get("time_step_rank", "auto")
    expand = config.get("expand", 2)
    inner = config.get("intermediate_size") or int(expand * D)
    if inner != int(expand * D):
        raise ValueError(f"mamba: intermediate_size={inner} is not expand={expand} x {D}")
    options = {
        "state_size": config.get("state_size", 16),
        "expand": float(expand),
        "conv_kernel": config.get("conv_kernel", 4),
        "dt_rank": math.ceil(D / 16) if rank in ("auto", None) else rank,
        "bias": bool(config.get("use_bias", False)),
        "conv_bias": bool(config.get("use_conv_bias", True)),
    }
    return bare_block(
        mixer=format_spec("mamba", options, Mamba),
        hidden_size=D,
        num_hidden_layers=L,
        vocab_size=vocabulary,
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        **shared(config),
    )


def config_out(config: StatewrightConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    rank = options["dt_rank"] or math.ceil(config.hidden_size / 16)
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        **common_out(config),
        "state_size": options["state_size"],
        "expand": whole(options["expand"], "expand"),
        "intermediate_size": int(options["expand"] * config.hidden_size),
        "conv_kernel": options["conv_kernel"],
        "time_step_rank": rank,
        "use_bias": options["bias"],
        "use_conv_bias": options["conv_bias"],
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "residual_in_fp32": True,
    }


def weights_in(tensors: Tensors) -> Tensors:
    return rename_in(tensors, _NAMES)


def weights_out(tensors: Tensors) -> Tensors:
    return rename_out(tensors, _NAMES)


FAMILY = Family("mamba", "hf", "mamba", config_in, config_out, weights_in, weights_out)
