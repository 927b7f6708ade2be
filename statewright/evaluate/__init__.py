"""Measure models on tasks: a Result says what was asked and what came out."""

from __future__ import annotations

from statewright.evaluate.losses import perplexity, token_losses
from statewright.evaluate.run import Result, evaluate

__all__ = ["Result", "evaluate", "perplexity", "token_losses"]
