"""The repair with training: a few hundred steps in which states are passed on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from statewright.diagnosis.repair import Repair, check_finite, try_policy
from statewright.train.config import TrainConfig
from statewright.train.data import Corpus
from statewright.train.distributed import TrainingStopped
from statewright.train.loop import Run

RESET_SHARE = 0.02
_TOKENS_PER_STEP = 2048
_MOST_LANES = 32


def passing_config(train_length: int, num_steps: int, learning_rate: float) -> TrainConfig:
    """Segments of the training length, each begun from the last one's state, 1 in 50 afresh.

    State passing with gradients cut (arXiv:2507.02782; TBPTT of arXiv:2410.07145, which has
    chains of 12), in steps of 2,048 tokens or more, cosine to a tenth. Chains of a fixed 32 leave
    the loss 9 % too high at 128 training lengths, and chains without end harm short texts.
    """
    return TrainConfig(
        num_steps=num_steps,
        num_lanes=max(4, min(_MOST_LANES, _TOKENS_PER_STEP // train_length)),
        length=train_length,
        documents="join",
        reset_share=RESET_SHARE,
        learning_rate=learning_rate,
        num_warmup_steps=min(20, num_steps // 4),
        eval_every=num_steps,
        save_every=num_steps,
        num_checkpoints=1,
    )


def pass_states(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    config: TrainConfig,
    directory: str | Path,
    listen: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Any:
    """Train the model in place on a corpus; checkpoints and the result stand in `directory`.

    Returns it in evaluation mode. Its config's policy is taken off: it has not been trained with.
    """
    model.config.policy = None
    run = Run(model, tokenizer, corpus, None, config, Path(directory), listen=listen)
    run.train()
    return model.eval()


def repair_by_training(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    report: Tensor,
    train_length: int,
    config: TrainConfig,
    directory: str | Path,
    listen: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Repair:
    """Pass states on (see `pass_states`); losses on `report` (B, N), before and after.

    The model is changed in place, whether it succeeds or not (`Repair.succeeded`). Raises
    ValueError for losses inside the training length, or in training, that are not finite.
    """
    before = try_policy(model, report, train_length, "none")
    check_finite(before)
    try:
        pass_states(model, tokenizer, corpus, config, directory, listen)
    except TrainingStopped as stop:
        raise ValueError(str(stop)) from stop
    after = try_policy(model, report, train_length, "none")
    return Repair(f"train:{config.num_steps}", train_length, (), before, after)
