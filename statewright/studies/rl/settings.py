"""What collecting, training and evaluating may be told; the paper's own values; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from statewright.studies.rl.scores import QUALITIES, task_of
from statewright.studies.settings import Settings, at_least_one


@dataclass(frozen=True)
class DecisionSettings(Settings):
    """Training of decision models; `paper_for(dataset)` is appendix C of arXiv:2410.01201.

    context: time steps per window, three tokens each (20 as in the Decision Transformer; the
    paper does not say). warmup: steps of a linear rise of the learning rate.
    """

    hidden_size: int = 64
    expansion: float = 1.0
    dropout: float = 0.1
    num_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 0.25
    eval_every: int = 500
    save_every: int = 500
    num_eval: int = 128
    context: int = 20
    warmup: int = 200
    PAPER: ClassVar[dict[str, Any]] = {
        "hidden_size": 128,
        "num_steps": 100_000,
        "batch_size": 64,
        "eval_every": 5000,
        "save_every": 1000,
        "warmup": 10_000,
    }
    WIDER: ClassVar[tuple[str, ...]] = ("hopper-medium", "hopper-medium-replay")
    SLOWER: ClassVar[tuple[str, ...]] = (*WIDER, "walker2d-medium")

    @classmethod
    def paper_for(cls, dataset: str) -> DecisionSettings:
        """The paper's values, which differ for a few datasets."""
        settings = cls.paper()
        assert isinstance(settings, DecisionSettings)
        if dataset in cls.WIDER:
            settings = replace(settings, hidden_size=256)
        return replace(settings, learning_rate=1e-4) if dataset in cls.SLOWER else settings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 1 or self.warmup < 0:
            raise ValueError(
                f"context={self.context}, warmup={self.warmup}; expected a time step or more, and "
                "0 or more steps"
            )


@dataclass(frozen=True)
class EvaluateSettings:
    """episodes per model, played `rows` at a time; policy: what bounds or repairs the state.

    target_return: what the models are asked for; 0: the best return of their training data.
    """

    episodes: int = 10
    rows: int = 10
    target_return: float = 0.0
    policy: str = "none"

    def __post_init__(self) -> None:
        at_least_one(self, "episodes", "rows")


@dataclass(frozen=True)
class CollectSettings:
    """How an agent is trained and what is stored of it.

    medium_score: normalised score at which training pauses for the medium policy (a third of
    D4RL's expert); expert_score: where it ends; max_steps: where it ends in any case (environment
    steps). steps: size of the medium and of the expert part. save_every: between checkpoints.
    """

    task: str = "hopper"
    quality: str = "medium"
    algorithm: str = "ppo"
    steps: int = 100_000
    medium_score: float = 33.0
    expert_score: float = 90.0
    max_steps: int = 2_000_000
    save_every: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        task_of(self.task)
        if self.quality not in QUALITIES:
            raise ValueError(f"quality={self.quality!r}, expected one of {', '.join(QUALITIES)}")
        if self.algorithm not in ("ppo", "sac", "td3"):
            raise ValueError(f"algorithm={self.algorithm!r}, expected ppo, sac or td3")
        at_least_one(self, "steps", "max_steps", "save_every")
        if not self.medium_score < self.expert_score:
            raise ValueError(
                f"medium_score={self.medium_score} is not below expert_score={self.expert_score}"
            )
