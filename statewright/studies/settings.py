"""What each study of the minimal-RNN paper may be told; the papers' own values; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal


def at_least_one(holder: object, *names: str) -> None:
    """ValueError, with the name, for an attribute below 1."""
    for name in names:
        if getattr(holder, name) < 1:
            raise ValueError(f"{name}={getattr(holder, name)}, expected at least 1")


def positive(holder: object, *names: str) -> None:
    """ValueError, with the name, for an attribute that is not above 0."""
    for name in names:
        if not getattr(holder, name) > 0:
            raise ValueError(f"{name}={getattr(holder, name)}, expected a positive number")


@dataclass(frozen=True)
class Settings:
    """Options that every trained study has; `paper()` gives the paper's in place of the defaults.

    eval_every, save_every: steps. stop_at: end a run once its held-out accuracy is that high.
    dtype: what products are computed in, by autocast; weights and states stay float32.
    """

    hidden_size: int = 64
    expansion: float = 4.0
    dropout: float = 0.0
    num_steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    eval_every: int = 250
    save_every: int = 1000
    num_eval: int = 512
    stop_at: float = 2.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    PAPER: ClassVar[dict[str, Any]] = {}

    @classmethod
    def paper(cls) -> Settings:
        return replace(cls(), **cls.PAPER)

    def __post_init__(self) -> None:
        at_least_one(self, "hidden_size", "num_steps", "batch_size", "eval_every", "save_every")
        positive(self, "learning_rate", "clip", "expansion")
        if self.num_eval < 1 or not 0 <= self.dropout < 1 or self.weight_decay < 0:
            raise ValueError(
                f"num_eval={self.num_eval}, dropout={self.dropout}, weight_decay="
                f"{self.weight_decay}; expected num_eval >= 1, 0 <= dropout < 1, weight_decay >= 0"
            )


@dataclass(frozen=True)
class SelectiveCopySettings(Settings):
    """Reduced: the calibrated 32 + 4 tokens; paper: 4,096 + 16 (arXiv:2410.01201, C.1)."""

    length: int = 32
    tokens: int = 4
    PAPER: ClassVar[dict[str, Any]] = {
        "length": 4096,
        "tokens": 16,
        "expansion": 6.0,
        "dropout": 0.1,
        "num_steps": 400_000,
        "batch_size": 64,
        "learning_rate": 3e-4,
        "eval_every": 2000,
        "stop_at": 0.9995,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tokens <= self.length:
            raise ValueError(
                f"length={self.length} is below the {self.tokens} tokens to copy"
                if self.tokens > 0
                else f"tokens={self.tokens}, expected at least 1"
            )


@dataclass(frozen=True)
class CharLMSettings(Settings):
    """Reduced: width 128, context 128; paper: width 384, context 256, 5,000 steps of 64 rows.

    patience: end a run after that many measurements without a lower loss (0: never).
    """

    hidden_size: int = 128
    expansion: float = 2.0
    dropout: float = 0.1
    num_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 0.25
    eval_every: int = 50
    num_eval: int = 128
    context: int = 128
    num_heads: int = 4
    patience: int = 0
    PAPER: ClassVar[dict[str, Any]] = {
        "hidden_size": 384,
        "dropout": 0.2,
        "num_steps": 5000,
        "batch_size": 64,
        "eval_every": 25,
        "num_eval": 1_000_000,
        "context": 256,
        "num_heads": 6,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 2 or self.num_heads < 1:
            raise ValueError(
                f"context={self.context}, num_heads={self.num_heads}; expected 2 or more tokens "
                "and a head"
            )


@dataclass(frozen=True)
class ChomskySettings(Settings):
    """Train on words of up to `train_length`, test up to 256; paper: width 256, 500,000 steps."""

    hidden_size: int = 64
    expansion: float = 1.0
    num_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    eval_every: int = 500
    num_eval: int = 256
    train_length: int = 40
    conv_kernel: int = 4
    PAPER: ClassVar[dict[str, Any]] = {
        "hidden_size": 256,
        "num_steps": 500_000,
        "batch_size": 256,
        "learning_rate": 3e-4,
        "eval_every": 5000,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_length < 2:
            raise ValueError(f"train_length={self.train_length}, expected at least 2 tokens")


@dataclass(frozen=True)
class ListOpsSettings(ChomskySettings):
    """As Chomsky, with an MLP (the paper's block for long-range tasks): 8 blocks of 128 there."""

    mlp_ratio: float = 2.0
    PAPER: ClassVar[dict[str, Any]] = {
        "hidden_size": 128,
        "num_steps": 250_000,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "eval_every": 5000,
    }


@dataclass(frozen=True)
class TrainCostSettings:
    """Forward, loss and backward; paper: a T4, batch 64, 100 runs, lengths to 4,096."""

    batch_size: int = 64
    hidden_size: int = 64
    num_layers: int = 1
    expansion: float = 1.0
    repeats: int = 3
    shortest: int = 64
    longest: int = 4096
    PAPER: ClassVar[dict[str, Any]] = {"repeats": 100, "num_layers": 3}

    @classmethod
    def paper(cls) -> TrainCostSettings:
        return replace(cls(), **cls.PAPER)

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "hidden_size", "num_layers", "repeats", "shortest")
        if self.longest < self.shortest:
            raise ValueError(
                f"shortest={self.shortest}, longest={self.longest}: expected shortest <= longest"
            )

    @property
    def lengths(self) -> list[int]:
        """Powers of two times `shortest`, up to `longest`."""
        found, length = [], self.shortest
        while length <= self.longest:
            found.append(length)
            length *= 2
        return found
