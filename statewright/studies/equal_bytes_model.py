"""Models of a given size of state: the one option of each mixer that sets it, solved for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.studies.equal_bytes_settings import EqualBytesSettings

_Spec = Callable[[EqualBytesSettings, int], str]
# The mixer's spec from a whole number of channels, keys per head or states: bytes are linear in it.
_MIXERS: dict[str, _Spec] = {
    "mingru": lambda s, n: f"mingru:expansion={_share(n, s.hidden_size)!r}",
    "minlstm": lambda s, n: f"minlstm:expansion={_share(n, s.hidden_size)!r}",
    "gru": lambda s, n: f"gru:expansion={_share(n, s.hidden_size)!r}",
    "lstm": lambda s, n: f"lstm:expansion={_share(n, s.hidden_size)!r}",
    "mamba": lambda s, n: f"mamba:state_size={n}",
    "mamba2": lambda s, n: f"mamba2:state_size={n}:head_dim={2 * s.hidden_size // s.num_heads}",
    "gla": lambda s, n: (
        f"gla:num_heads={s.num_heads}:expand_k={_share(n * s.num_heads, s.hidden_size)!r}"
    ),
}
# Trained with a smaller state first, and grown.
GROWN = {"mamba2-grown": "mamba2"}
LISTS = "transformer"
NAMES = (*_MIXERS, *GROWN, LISTS)
_OWN_CONVOLUTION = ("mamba", "mamba2")


@dataclass(frozen=True)
class Reached:
    """A config whose state has `bytes` per sequence; `size` is the option that was solved for."""

    config: StatewrightConfig
    size: int
    bytes: int
    parameters: int


def config_of(
    name: str, size: int, layers: int, vocab: int, settings: EqualBytesSettings
) -> StatewrightConfig:
    """The same block for all; a mixer with a convolution of its own goes without the block's."""
    mixer = f"attention:num_heads={settings.num_heads}"
    if name != LISTS:
        mixer = _MIXERS[name](settings, size)
    return StatewrightConfig(
        vocab_size=vocab,
        hidden_size=settings.hidden_size,
        num_hidden_layers=layers,
        mixer=mixer,
        conv_kernel=0 if name in _OWN_CONVOLUTION else settings.conv_kernel,
        mlp_ratio=settings.mlp_ratio,
        dropout=settings.dropout,
    )


def solve(
    name: str, target: int, layers: int, vocab: int, settings: EqualBytesSettings
) -> Reached | str:
    """The model whose state is nearest to `target` bytes; or why there is none.

    Bytes are those of an empty state (they do not grow), convolutions' taps included, counted on
    torch's meta device. A grown model's size is a multiple of `settings.grow`.
    """
    step = settings.grow if name in GROWN else 1
    base = GROWN.get(name, name)

    def bytes_of(size: int) -> int:
        return _sizes(config_of(base, size, layers, vocab, settings))[0]

    first, second = bytes_of(step), bytes_of(2 * step)
    count = max(1, 1 + round((target - first) / (second - first)))
    config = config_of(base, count * step, layers, vocab, settings)
    found, parameters = _sizes(config)
    if abs(found - target) > settings.tolerance * target:
        return f"the nearest state has {found:,} bytes"
    if parameters > settings.max_parameters:
        return f"{parameters:,} parameters, more than {settings.max_parameters:,}"
    return Reached(config, count * step, found, parameters)


def build(config: StatewrightConfig, seed: int, device: torch.device) -> StatewrightForCausalLM:
    """The model, its weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StatewrightForCausalLM(config).to(device)


def _sizes(config: StatewrightConfig) -> tuple[int, int]:
    """Bytes of one sequence's empty state, and parameters."""
    with torch.device("meta"):
        model = StatewrightForCausalLM(config)
        return model.init_state(1).nbytes, sum(p.numel() for p in model.parameters())


def _share(size: int, width: int) -> float:
    """The option that makes int(width x option) exactly this size."""
    share = size / width
    return share if int(width * share) == size else math.nextafter(share, math.inf)
