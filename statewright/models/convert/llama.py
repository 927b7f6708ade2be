"""Llama and its close relatives in transformers: llama, mistral, qwen2, qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statewright.mixers import Attention
from statewright.models.config import StatewrightConfig
from statewright.models.convert.family import (
    Family,
    Renaming,
    Tensors,
    common_out,
    expect,
    needed,
    shared,
)
from statewright.spec import format_spec

KINDS = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_LAYER = "model.layers.{}."
_MIXER = [f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
_MIXER += ["q_norm.weight", "k_norm.weight"]
_NAMES = Renaming(
    [(f"{_LAYER}self_attn.{name}", f"{_LAYER}mixer.{name}") for name in _MIXER]
    + [(f"{_LAYER}mlp.{p}_proj.weight", f"{_LAYER}mlp.{p}.weight") for p in ("gate", "up", "down")]
    + [
        ("model.embed_tokens.weight", "model.embeddings.weight"),
        (f"{_LAYER}input_layernorm.weight", f"{_LAYER}norm.weight"),
        (f"{_LAYER}post_attention_layernorm.weight", f"{_LAYER}mlp_norm.weight"),
    ]
)


def config_in(config: Mapping[str, Any]) -> StatewrightConfig:
    """From transformers' config as a dict; ValueError for what we do not build."""
    kind = config["model_type"]
    expect(config, kind, hidden_act="silu", mlp_bias=False, attention_dropout=(0, 0.0))
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    D, L, vocabulary, heads = needed(config, kind, *names, "intermediate_size")[:4]
    eps = config.get("rms_norm_eps", 1e-6)
    theta, scaling = _rope_in(config, kind)
    biased = bool(config.get("attention_bias", kind == "qwen2"))
    options = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (128 if kind == "qwen3" else D // heads),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": kind == "qwen2" or biased,
        "out_bias": kind != "qwen2" and biased,
        "qk_norm": kind == "qwen3",
        "eps": eps if kind == "qwen3" else 1e-6,
    }
    windows = [_window(config, kind, i) for i in range(L)]
    specs = [format_spec("attention", {**options, "window": w}, Attention) for w in windows]
    return StatewrightConfig(
        mixer=specs[0] if len(set(specs)) == 1 else specs,
        hidden_size=D,
        num_hidden_layers=L,
        vocab_size=vocabulary,
        conv_kernel=0,
        mlp="swiglu",
        mlp_size=config["intermediate_size"],
        norm="rmsnorm",
        norm_eps=eps,
        **{"tie_word_embeddings": False, **shared(config)},
    )


def _window(config: Mapping[str, Any], kind: str, layer: int) -> int | None:
    """The sliding window of one layer; only Qwen's configs have a switch and a list for it."""
    size = config.get("sliding_window")
    if size is None or kind == "llama":
        return None
    if kind == "mistral":
        return size
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    if types is not None:
        return size if types[layer] == "sliding_attention" else None
    return size if layer >= config.get("max_window_layers", 28) else None


def _rope_in(config: Mapping[str, Any], kind: str) -> tuple[float, str]:
    """theta and our scaling string, from transformers 5's `rope_parameters` or the older keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    how = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{kind}: partial_rotary_factor is not supported, expected 1.0")
    if how == "default":
        return theta, "none"
    if how == "linear":
        return theta, f"linear-{_number(rope['factor'])}"
    if how == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return theta, "-".join(["llama3", *(_number(rope[key]) for key in keys)])
    raise ValueError(
        f"{kind}: rope_type={how!r} is not supported, expected default, linear or llama3"
    )


def _number(value: float) -> str:
    return repr(int(value)) if float(value).is_integer() else repr(float(value))


def config_out(config: StatewrightConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind_of(options)
    heads = options["num_heads"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": options["rope_theta"]}
    how, *numbers = options["rope_scaling"].split("-")
    if how == "linear":
        rope |= {"rope_type": how, "factor": float(numbers[0])}
    elif how == "llama3":
        factor, low, high, context = map(float, numbers)
        rope |= {"rope_type": how, "factor": factor, "low_freq_factor": low}
        rope |= {"high_freq_factor": high, "original_max_position_embeddings": int(context)}
    out = {
        "model_type": kind,
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        **common_out(config),
        "num_attention_heads": heads,
        "num_key_value_heads": options["num_kv_heads"] or heads,
        "head_dim": options["head_dim"] or config.hidden_size // heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
    }
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = options["out_bias"]
    if kind == "llama":
        out["mlp_bias"] = False
    if kind == "mistral":
        out["sliding_window"] = options["window"]
    elif kind != "llama":
        out |= {"use_sliding_window": options["window"] is not None}
        out |= {"sliding_window": options["window"], "max_window_layers": 0}
        window = "full_attention" if options["window"] is None else "sliding_attention"
        out["layer_types"] = [window] * config.num_hidden_layers
    return out


def _kind_of(options: Mapping[str, Any]) -> str:
    """The relative that has these options; ValueError if none does."""
    if options["qk_norm"]:
        if options["qkv_bias"] == options["out_bias"]:
            return "qwen3"
    elif options["qkv_bias"] and not options["out_bias"]:
        return "qwen2"
    elif options["window"] is None and options["qkv_bias"] == options["out_bias"]:
        return "llama"
    elif not options["qkv_bias"] and not options["out_bias"]:
        return "mistral"
    raise ValueError(
        "convert: no model of transformers has this attention (biases: "
        f"qkv {options['qkv_bias']}, out {options['out_bias']}; window {options['window']}; "
        f"qk_norm {options['qk_norm']})"
    )


def weights_in(tensors: Tensors) -> Tensors:
    """Their names to ours; the rotary frequencies that old checkpoints carry are computed here."""
    kept = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    return {_NAMES.ours(name): tensor for name, tensor in kept.items()}


def weights_out(tensors: Tensors) -> Tensors:
    return {_NAMES.theirs(name): tensor.contiguous() for name, tensor in tensors.items()}


FAMILY = Family("llama", "hf", "attention", config_in, config_out, weights_in, weights_out)
