"""The one configuration of the one decoder."""

from __future__ import annotations

import os
from typing import Any, Literal

from transformers import PreTrainedConfig

from statewright.hf.arguments import NAMES
from statewright.models.shim import write_shim
from statewright.policies import build_policy


class StatewrightConfig(PreTrainedConfig):
    """Hugging Face configuration of `StatewrightForCausalLM`.

    mixer: a spec string such as "mingru:expansion=2", or a list of them, cycled over the layers
    (hybrids); sizes that differ per layer stand in the strings. The papers' block options, all
    per layer: conv_kernel (0: no convolution; 4: Conv4), mlp_ratio (0: no MLP; mlp_size overrides
    it), mlp, norm, dropout. policy: a spec such as "tova:budget=512", the default of the models'
    argument `policy`, which overrides it ("none" switches it off).

    >>> StatewrightConfig(num_hidden_layers=4, mixer=["mingru", "mamba2"]).mixer_of(3)
    'mamba2'
    """

    model_type = "statewright"
    keys_to_ignore_at_inference = [*NAMES, "state"]

    vocab_size: int = 257
    hidden_size: int = 256
    num_hidden_layers: int = 4
    mixer: str | list[str] = "mingru"
    conv_kernel: int = 4
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_ratio: float = 4.0
    mlp_size: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    policy: str | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        build_policy(self.policy)
        if not self.mixer:
            raise ValueError("config: mixer is empty, expected a spec such as 'mingru'")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name}={getattr(self, name)}, expected at least 1")
        if self.mlp_ratio < 0:
            raise ValueError(f"config: mlp_ratio={self.mlp_ratio}, expected 0 or more")
        if self.conv_kernel == 1 or self.conv_kernel < 0:
            raise ValueError(f"config: conv_kernel={self.conv_kernel}, expected 0 or at least 2")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers', with the two lines by which `trust_remote_code=True` finds us."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_shim(save_directory)

    @property
    def mlp_width(self) -> int:
        """Inner channels of the MLP; 0 for none."""
        return int(self.hidden_size * self.mlp_ratio) if self.mlp_size is None else self.mlp_size

    def mixer_of(self, layer: int) -> str:
        """The spec string of one layer."""
        if isinstance(self.mixer, str):
            return self.mixer
        return self.mixer[layer % len(self.mixer)]
