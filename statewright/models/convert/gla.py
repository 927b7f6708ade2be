"""Gated linear attention: flash-linear-attention's `gla`, with both names of the gate norm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from statewright.mixers import GLA
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
from statewright.spec import format_spec

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gk_proj.0", "gk_proj.1"]
_LAYER = "model.layers.{}."
_NAMES = Renaming(
    [(f"{_LAYER}attn.{p}.weight", f"{_LAYER}mixer.{p}.weight") for p in _PROJECTIONS]
    + [(f"{_LAYER}mlp.{p}_proj.weight", f"{_LAYER}mlp.{p}.weight") for p in ("gate", "up", "down")]
    + [
        (f"{_LAYER}attn.gk_proj.1.bias", f"{_LAYER}mixer.gk_proj.1.bias"),
        (f"{_LAYER}attn.g_norm_swish_gate.weight", f"{_LAYER}mixer.g_norm.weight"),
        (f"{_LAYER}attn.g_norm.weight", f"{_LAYER}mixer.g_norm.weight"),
        (f"{_LAYER}attn_norm.weight", f"{_LAYER}norm.weight"),
        (f"{_LAYER}mlp_norm.weight", f"{_LAYER}mlp_norm.weight"),
    ]
)
_CONV = re.compile(r"(model\.layers\.\d+\.)attn\.([qkv])_conv1d\.(weight|bias)")
_FEATURES = {None: "none", "identity": "none", "relu": "relu", "elu": "elu", "silu": "silu"}


def config_in(config: Mapping[str, Any]) -> StatewrightConfig:
    """From fla's GLAConfig as a dict; ValueError for what we do not build."""
    expect(
        config,
        "gla",
        hidden_act=("swish", "silu"),
        use_gk=True,
        use_gv=False,
        clamp_min=None,
        attn=None,
        num_kv_heads=(None, config.get("num_heads", 4)),
        elementwise_affine=True,
        feature_map=tuple(_FEATURES),
    )
    D, L, vocabulary = needed(config, "gla", "hidden_size", "num_hidden_layers", "vocab_size")
    eps = config.get("norm_eps", 1e-6)
    options = {
        "num_heads": config.get("num_heads", 4),
        "expand_k": float(config.get("expand_k", 0.5)),
        "expand_v": float(config.get("expand_v", 1.0)),
        "gate_rank": config.get("gate_low_rank_dim", 16),
        "gate_normalizer": float(config.get("gate_logit_normalizer", 16)),
        "conv_kernel": config.get("conv_size", 4) if config.get("use_short_conv") else 0,
        "feature_map": _FEATURES[config.get("feature_map")],
        "output_gate": bool(config.get("use_output_gate", True)),
        "eps": eps,
    }
    return StatewrightConfig(
        mixer=format_spec("gla", options, GLA),
        hidden_size=D,
        num_hidden_layers=L,
        vocab_size=vocabulary,
        conv_kernel=0,
        mlp="swiglu",
        mlp_size=_intermediate(config, D),
        norm="rmsnorm",
        norm_eps=eps,
        **shared(config),
    )


def _intermediate(config: Mapping[str, Any], hidden_size: int) -> int:
    """fla's rule: two thirds of hidden_ratio x hidden_size, rounded up to 256."""
    if config.get("intermediate_size"):
        return config["intermediate_size"]
    size = int(hidden_size * (config.get("hidden_ratio") or 4) * 2 / 3)
    return 256 * -(-size // 256)


def config_out(config: StatewrightConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _FEATURES.items() if theirs != "identity"}
    return {
        "model_type": "gla",
        "architectures": ["GLAForCausalLM"],
        **common_out(config),
        "num_heads": options["num_heads"],
        "expand_k": options["expand_k"],
        "expand_v": options["expand_v"],
        "gate_low_rank_dim": options["gate_rank"],
        "gate_logit_normalizer": whole(options["gate_normalizer"], "gate_normalizer"),
        "use_short_conv": bool(options["conv_kernel"]),
        "conv_size": options["conv_kernel"] or 4,
        "feature_map": names[options["feature_map"]],
        "use_output_gate": options["output_gate"],
        "use_gk": True,
        "use_gv": False,
        "hidden_act": "swish",
        "intermediate_size": config.mlp_width,
        "norm_eps": config.norm_eps,
        "fuse_norm": True,
    }


def weights_in(tensors: Tensors) -> Tensors:
    """Their names to ours; three short convolutions to one over [q | k | v]."""
    found: Tensors = {}
    convs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _CONV.fullmatch(name)
        if match:
            layer, which, kind = match.groups()
            tensor = tensor.squeeze(1) if kind == "weight" else tensor
            convs.setdefault(f"{layer}mixer.conv.{kind}", {})[which] = tensor
        else:
            found[_NAMES.ours(name)] = tensor
    for name, parts in convs.items():
        if set(parts) != set("qkv"):
            raise ValueError(f"gla: {name} needs convolutions of q, k and v, found {sorted(parts)}")
        found[name] = torch.cat([parts[which] for which in "qkv"])
    return found


def weights_out(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    gated = any(name.endswith("mixer.g_proj.weight") for name in tensors)
    for name, tensor in tensors.items():
        if ".mixer.conv." not in name:
            theirs = _NAMES.theirs(name)
            if theirs.endswith("g_norm_swish_gate.weight") and not gated:
                theirs = theirs.replace("g_norm_swish_gate", "g_norm")
            found[theirs] = tensor.contiguous()
            continue
        layer, kind = name.split("mixer.conv.")
        keys = tensors[f"{layer}mixer.q_proj.weight"].shape[0]
        for which, part in zip("qkv", tensor.split([keys, keys, tensor.shape[0] - 2 * keys])):
            part = part.unsqueeze(1) if kind == "weight" else part
            found[f"{layer}attn.{which}_conv1d.{kind}"] = part.contiguous()
    return found


FAMILY = Family("gla", "fla", "gla", config_in, config_out, weights_in, weights_out)
