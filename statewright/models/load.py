"""`statewright.load(path)`: a checkpoint in, our model out; and `save_as`, the way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from statewright import spec
from statewright.hf.pretrained import locate
from statewright.mixers import MIXERS
from statewright.models.calibration import read_norms
from statewright.models.config import StatewrightConfig
from statewright.models.convert import FAMILIES
from statewright.models.convert.family import Family
from statewright.models.lm import StatewrightForCausalLM
from statewright.models.weights import fit, read_weights
from statewright.state_file import write_tensors

OURS = StatewrightConfig.model_type
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "spiece", "added_tokens")


def load(path: str | Path, dtype: torch.dtype | str | None = None) -> StatewrightForCausalLM:
    """Load a model directory in evaluation mode: ours, or a family of `models/convert`.

    path: also a name such as `demo:collapsed` or `smollm2-135m`. Also reads the original
    `state-spaces` layout. dtype None keeps the checkpoint's. Raises ValueError, in one line, for a
    directory without a model, an unsupported type or option, a damaged file, and weights that are
    missing, unexpected, mis-shaped or of mixed dtypes.

    >>> load("demo:recall").num_parameters()
    79504
    """
    path = Path(locate(path))
    raw = read_config(path)
    config, family = config_of(raw, path)
    tensors = read_weights(path)
    if family is not None:
        tensors = family.weights_in(tensors)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    try:
        with torch.device("meta"):
            model = StatewrightForCausalLM(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()} or {torch.float32}
    model = model.to(sorted(kinds, key=str)[0]).to_empty(device="cpu")
    fit(model, tensors, str(path))
    model.model.norms = read_norms(path)
    _load_generation_config(model, path)
    model.config.return_dict = True  # tuples are for those who call the model themselves
    return model.eval()


def save_as(
    model: StatewrightForCausalLM, target: str, directory: Path, source: Path | None = None
) -> None:
    """Write the model in another library's format: target "hf" or "fla".

    Raises ValueError if that format cannot express it (several mixers, sizes that differ between
    layers, block options it does not have). Tokenizer files are copied from `source`.

    >>> shape = dict(hidden_size=8, num_hidden_layers=2, mlp_ratio=0, conv_kernel=0)
    >>> model = StatewrightForCausalLM(StatewrightConfig(mixer="mamba2:head_dim=8", **shape))
    >>> save_as(model, "hf", Path("runs/as-transformers"))
    """
    family, options = _expressible(model.config, target)
    directory.mkdir(parents=True, exist_ok=True)
    config = family.config_out(model.config, options)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    tensors = model.state_dict()
    for name in getattr(model, "all_tied_weights_keys", None) or ():
        tensors.pop(name, None)
    tensors = {n: t.clone() for n, t in family.weights_out(tensors).items()}
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if source is not None:
        copy_tokenizer(source, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the files of a checkpoint's tokenizer."""
    for file in sorted(source.iterdir()):
        if file.name.startswith(_TOKENIZER_FILES):
            shutil.copyfile(file, directory / file.name)


def read_config(path: Path) -> dict[str, Any]:
    """The directory's config.json; ValueError, with a hint, if there is none."""
    file = path / "config.json"
    if not file.is_file():
        newest = sorted(path.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
        hint = f"; did you mean {newest[-1]}?" if newest else ""
        raise ValueError(f"{path}: no model there (no config.json){hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: damaged (not a JSON object)")
    return config


def config_of(raw: Mapping[str, Any], path: Path) -> tuple[StatewrightConfig, Family | None]:
    """Our config for a checkpoint's, and the family it is from (None: ours)."""
    if "model_type" not in raw and "ssm_cfg" in raw:
        raw = _from_original(raw)
    kind = raw.get("model_type")
    try:
        if kind == OURS:
            return StatewrightConfig.from_dict(dict(raw)), None
        if kind in FAMILIES:
            return FAMILIES[kind].config_in(raw), FAMILIES[kind]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    known = ", ".join(sorted([OURS, *FAMILIES]))
    raise ValueError(f"{path}: model type {kind!r} is not supported (known: {known})")


def _from_original(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of `state-spaces` checkpoints, in transformers' words."""
    inner = dict(raw["ssm_cfg"] or {})
    kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}.get(inner.pop("layer", "Mamba1"))
    if kind is None or raw.get("attn_layer_idx"):
        raise ValueError("state-spaces config: only pure Mamba1 and Mamba2 models are supported")
    multiple = raw.get("pad_vocab_size_multiple", 8)
    vocabulary = multiple * -(-raw["vocab_size"] // multiple)
    D, expand = raw["d_model"], inner.get("expand", 2)
    config = {
        "model_type": kind,
        "hidden_size": D,
        "num_hidden_layers": raw["n_layer"],
        "vocab_size": vocabulary,
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        "expand": expand,
        "conv_kernel": inner.get("d_conv", 4),
        "state_size": inner.get("d_state", 128 if kind == "mamba2" else 16),
        "rms_norm": raw.get("rms_norm", True),
    }
    if kind == "mamba2":
        head_dim = inner.get("headdim", 64)
        config |= {"head_dim": head_dim, "num_heads": int(expand * D) // head_dim}
        config |= {"n_groups": inner.get("ngroups", 1)}
    return config


def _expressible(config: StatewrightConfig, target: str) -> tuple[Family, dict[str, Any]]:
    specs = {config.mixer_of(i) for i in range(config.num_hidden_layers)}
    if len(specs) > 1:
        raise ValueError(
            f"convert: layers differ ({' and '.join(sorted(specs)[:2])}), but {target} has one "
            "mixer and one state size for all layers"
        )
    name, given = spec.split(specs.pop())
    family = next((f for f in FAMILIES.values() if (f.mixer, f.target) == (name, target)), None)
    if family is None:
        known = ", ".join(f"{f.mixer} to {f.target}" for f in FAMILIES.values())
        raise ValueError(f"convert: {target} has no format for {name!r} (known: {known})")
    options = {n: p.default for n, p in spec.options_of(MIXERS[name]).items()}
    options |= spec.typed(given, MIXERS[name], f"mixer {name!r}")
    back = family.config_in(family.config_out(config, options))
    for key in ("conv_kernel", "mlp_width", "mlp", "norm", "norm_eps", "tie_word_embeddings"):
        if key == "mlp" and not config.mlp_width:
            continue
        have, kept = getattr(config, key), getattr(back, key)
        if have != kept:
            raise ValueError(
                f"convert: {target}'s {family.model_type} has {key} = {kept!r}, this model {have!r}"
            )
    return family, options


def _load_generation_config(model: StatewrightForCausalLM, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
