"""The systems of the capacity study: a Mamba-2 by state size, and a Transformer of its weight."""

from __future__ import annotations

import torch
from torch import nn

from statewright.diagnosis.controls import scale_decay
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.state import MatrixState
from statewright.studies.capacity_keys import tokenizer_of
from statewright.studies.capacity_settings import SYSTEMS, CapacitySettings, Shape


def build(
    system: str, shape: Shape, settings: CapacitySettings, seed: int
) -> StatewrightForCausalLM:
    """Weights drawn from the seed. low-decay: Mamba-2, decay rates times settings.decay_scale.

    official: the same with Mamba-2's own initialisation. transformer: of equal width and depth, its
    MLP as wide as makes the number of parameters equal. Raises ValueError for another name.
    """
    config = config_of(system, shape, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StatewrightForCausalLM(config)
        # Tied to the head: torch's N(0, 1) would begin with logits of size sqrt(D).
        nn.init.normal_(model.model.embeddings.weight, std=0.02)
    return scale_decay(model, settings.decay_scale) if system == "low-decay" else model


def config_of(system: str, shape: Shape, settings: CapacitySettings) -> StatewrightConfig:
    """Without building anything but shapes (torch's meta device)."""
    if system not in SYSTEMS:
        raise ValueError(f"unknown system {system!r} (known: {', '.join(SYSTEMS)})")
    width = shape.width or settings.hidden_size
    heads = shape.heads or 2 * width // settings.head_dim
    if not shape.heads and 2 * width % settings.head_dim:
        raise ValueError(f"size {shape}: head_dim={settings.head_dim} does not divide {2 * width}")
    expand = heads * settings.head_dim / width
    depth = shape.depth or settings.num_layers
    mamba = f"mamba2:state_size={shape.state}:head_dim={settings.head_dim}:expand={expand!r}"
    if int(expand * width) != heads * settings.head_dim:
        raise ValueError(f"size {shape}: {heads} heads are no multiple of width {width} that fits")
    config = _config(width, depth, mamba, 0, settings.tokens)
    if system != "transformer":
        return config
    return _equal(width, depth, num_parameters(config), settings)


def num_parameters(config: StatewrightConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in StatewrightForCausalLM(config).parameters())


def state_numbers(model: StatewrightForCausalLM) -> int:
    """N_S: numbers in the matrix states of one sequence, without convolutions' taps; 0 for none."""
    layers = model.init_state(1).layers
    return sum(layer.S.numel() for layer in layers if isinstance(layer, MatrixState))


def _equal(width: int, depth: int, wanted: int, settings: CapacitySettings) -> StatewrightConfig:
    heads = max(1, width // settings.head_dim)
    if width % (2 * heads):
        raise ValueError(f"transformer: {heads} heads do not divide width {width} into even parts")
    mixer = f"attention:num_heads={heads}"
    least, more = (num_parameters(_config(width, depth, mixer, m, settings.tokens)) for m in (1, 2))
    size = 1 + round((wanted - least) / (more - least))
    if size < 1:
        raise ValueError(
            f"transformer: its attention alone has more than the {wanted:,} parameters of the "
            "Mamba-2 that it is to equal"
        )
    return _config(width, depth, mixer, size, settings.tokens)


def _config(width: int, depth: int, mixer: str, mlp_size: int, tokens: str) -> StatewrightConfig:
    tokenizer = tokenizer_of(tokens)
    return StatewrightConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=depth,
        mixer=mixer,
        conv_kernel=0,
        mlp_ratio=0.0,
        mlp_size=mlp_size or None,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
