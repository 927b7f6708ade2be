"""What a training run is: everything but the model, the text and the place to write."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from statewright.spec import parse_int

_AT_LEAST = {
    "num_steps": 1, "num_lanes": 1, "length": 1, "eval_every": 1, "save_every": 1,
    "num_checkpoints": 1, "num_accumulation": 1, "gradient_segments": 1,
    "num_warmup_steps": 0, "weight_decay": 0, "num_segments": 0,
}  # fmt: skip
_SHARES = {
    "final_rate": 1,
    "decay_share": 1,
    "reset_share": 1,
    "beta1": 0.999999,
    "beta2": 0.999999,
}
_TRAINED = re.compile(r"all|state|mixers(:\d+(,\d+)*)?")


@dataclass(frozen=True)
class TrainConfig:
    """Options of `train`; counts are `num_*`, lengths are tokens, a batch is lanes x length.

    A step reads `gradient_segments` segments of every lane, and gradients go through all of them;
    `initial` says what a lane's state is before them. Raises ValueError for values that cannot be
    trained with.
    """

    num_steps: int = 1000
    num_lanes: int = 16
    length: int = 256
    curriculum: str = ""
    documents: Literal["reset", "join"] = "reset"
    initial: Literal["previous", "zero", "other", "noise"] = "previous"
    num_segments: int = 0
    reset_share: float = 0.0
    gradient_segments: int = 1
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    num_warmup_steps: int = 50
    decay_share: float = 0.1
    final_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_accumulation: int = 1
    checkpointing: bool = False
    train_only: str = "all"
    policy: str = "none"
    parallel: Literal["rows", "sharded", "context"] = "rows"
    seed: int = 0
    eval_every: int = 100
    save_every: int = 200
    num_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {least}")
        for name, most in _SHARES.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}, expected a share, 0 to {most}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate={self.learning_rate}, expected a positive number")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}, expected a positive number")
        for name, hint in get_type_hints(TrainConfig).items():
            if get_args(hint) and getattr(self, name) not in get_args(hint):
                known = ", ".join(get_args(hint))
                raise ValueError(f"{name}={getattr(self, name)!r}, expected one of {known}")
        self._check_together()

    def _check_together(self) -> None:
        parse_curriculum(self.curriculum)
        _check_policy(self.policy)
        if not _TRAINED.fullmatch(self.train_only):
            raise ValueError(
                f"train_only={self.train_only!r}, expected all, state, mixers, or mixers:0,6 for "
                "the mixers of some layers"
            )
        if self.train_only == "state" and self.initial != "zero":
            raise ValueError(
                "train_only=state needs initial=zero: every segment begins from the learned state"
            )
        if self.parallel == "context" and (self.policy != "none" or self.train_only == "state"):
            raise ValueError("parallel=context takes neither a policy nor train_only=state")
        if self.parallel == "sharded" and self.train_only == "state":
            raise ValueError("parallel=sharded: train_only=state has no weights to shard")
        if self.num_segments and self.initial != "previous":
            raise ValueError(
                f"num_segments={self.num_segments} counts segments that begin from the previous "
                f"one's state, but initial={self.initial}"
            )
        if self.num_segments % self.gradient_segments:
            raise ValueError(
                f"num_segments={self.num_segments}, expected a multiple of "
                f"gradient_segments={self.gradient_segments}"
            )
        if self.num_lanes % self.num_accumulation:
            raise ValueError(
                f"num_accumulation={self.num_accumulation} does not divide "
                f"num_lanes={self.num_lanes}"
            )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(first segment, length) of every phase of the curriculum."""
        later = [
            (step * self.gradient_segments, n) for step, n in parse_curriculum(self.curriculum)
        ]
        return [(0, self.length), *later]

    @property
    def train_length(self) -> int:
        """Tokens that a gradient spans, at most."""
        return max(length for _, length in self.lengths) * self.gradient_segments

    def train_context(self, longest: int) -> int:
        """Most tokens a state is carried over, in documents of up to `longest` tokens."""
        reach = self.train_length
        if self.initial in ("previous", "other"):
            reach = longest if self.num_segments == 0 else self.num_segments * self.length
            reach = max(self.train_length, reach)
        return min(reach, longest)

    def rate(self, step: int) -> float:
        """The learning rate of a step, after a linear warm-up.

        cosine: falls to final_rate (a share) at num_steps. wsd (warm-up, stable, decay): constant,
        then linear over the last decay_share of the steps. constant: neither.
        """
        if step < self.num_warmup_steps:
            return self.learning_rate * (step + 1) / self.num_warmup_steps
        begin = self.num_warmup_steps
        if self.schedule == "wsd":
            begin = max(begin, self.num_steps - round(self.decay_share * self.num_steps))
        progress = (step - begin) / max(1, self.num_steps - begin)
        progress = min(1.0, max(0.0, progress))
        left = {
            "constant": 1.0,
            "wsd": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.schedule]
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * left)


def parse_curriculum(text: str) -> list[tuple[int, int]]:
    """`"1k@500,4k@2000"`: (step, length) pairs; rows of 1,024 tokens from step 500 on, and so on.

    Raises ValueError for what is not of this form, or whose steps do not increase.
    """
    pairs = []
    for part in filter(None, text.split(",")):
        length, at, step = part.partition("@")
        try:
            pairs.append((parse_int(step), parse_int(length)))
        except (ValueError, IndexError):
            raise ValueError(
                f"curriculum={text!r}: expected length@step such as 1k@500,4k@2000, got {part!r}"
            ) from None
    steps = [0, *(step for step, _ in pairs)]
    if any(a >= b for a, b in zip(steps, steps[1:])):
        raise ValueError(f"curriculum={text!r}: the steps must increase, from 1 on")
    if any(length < 1 for _, length in pairs):
        raise ValueError(f"curriculum={text!r}: a length must be at least 1")
    return pairs


def _check_policy(text: str) -> None:
    # Only where there is one: policies import torch, and the command line's checks must not.
    if text != "none":
        from statewright.policies import build_policy

        build_policy(text)
