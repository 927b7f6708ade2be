"""What a training run is: everything but the model, the text and the place to write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints


@dataclass(frozen=True)
class TrainConfig:
    """Options of `train`; counts are `num_*`, lengths are tokens, a batch is lanes x length.

    Raises ValueError for values that cannot be trained with.
    """

    num_steps: int = 1000
    num_lanes: int = 16
    length: int = 256
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    num_warmup_steps: int = 50
    final_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    eval_every: int = 100
    save_every: int = 200
    num_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_lanes", "length", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.num_checkpoints < 1:
            raise ValueError(f"num_checkpoints={self.num_checkpoints}, expected at least 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate={self.learning_rate}, expected a positive number")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}, expected a positive number")
        for name in ("num_warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 0")
        for name in ("schedule", "dtype"):
            known = get_args(get_type_hints(TrainConfig)[name])
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {known}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate={self.final_rate}, expected a share of learning_rate")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then cosine to final_rate or constant."""
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        span = max(1, self.num_steps - self.num_warmup_steps)
        progress = min(1.0, (step - self.num_warmup_steps) / span)
        share = self.final_rate + (1 - self.final_rate) * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * share
