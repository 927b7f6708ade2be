"""What the study of equal bytes may be told; no torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from statewright.studies.settings import Settings

TASKS = ("mqar", "copying", "selective-copy")
POLICIES = ("window", "window:sinks=4", "h2o", "tova")


@dataclass(frozen=True)
class EqualBytesSettings(Settings):
    """Small models, trained on one recall task each, at `sizes` bytes of state per sequence.

    policies: of the Transformer, which is trained once, without bounds. tolerance: a model is at a
    size if its bytes are that close to it. max_parameters: what needs more is not trained. grow:
    the factor of the expanded Mamba-2, which is grown after half of the steps. length, pairs,
    vocab: of mqar; copy_length, copy_tokens: of both copying tasks.
    """

    num_steps: int = 2000
    learning_rate: float = 2e-3
    eval_every: int = 200
    stop_at: float = 0.998
    sizes: tuple[int, ...] = (4096, 8192, 16384, 32768)
    policies: tuple[str, ...] = POLICIES
    tolerance: float = 0.1
    max_parameters: int = 4_000_000
    grow: int = 4
    num_heads: int = 4
    conv_kernel: int = 4
    mlp_ratio: float = 2.0
    pairs: int = 8
    length: int = 64
    vocab: int = 64
    copy_length: int = 32
    copy_tokens: int = 16
    LEAST: ClassVar[dict[str, int]] = {"grow": 2, "num_heads": 1, "max_parameters": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in self.LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes={self.sizes}, expected different numbers of bytes from 1 on")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}, expected a share between 0 and 1")
        for policy in self.policies:
            if "budget=" in policy:
                raise ValueError(f"policy {policy!r}: bytes take the place of its budget")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}"
            )
