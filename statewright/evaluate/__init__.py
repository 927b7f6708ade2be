"""Measure models on tasks: a Result says what was asked and what came out."""

from __future__ import annotations

from statewright.evaluate.context import ShortContext, build_bound, short_context_losses
from statewright.evaluate.losses import losses_into, perplexity, token_losses
from statewright.evaluate.paired import Paired, paired
from statewright.evaluate.run import Result, evaluate

__all__ = [
    "Paired",
    "Result",
    "ShortContext",
    "build_bound",
    "evaluate",
    "losses_into",
    "paired",
    "perplexity",
    "short_context_losses",
    "token_losses",
]
