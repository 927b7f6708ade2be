"""Measure models on tasks: a Result says what was asked and what came out."""

from __future__ import annotations

from statewright.evaluation.context import ShortContext, build_bound, short_context_losses
from statewright.evaluation.curves import Curve
from statewright.evaluation.equal_bytes import Missing, byte_curves, run_bytes
from statewright.evaluation.grid import Plan, run_plan
from statewright.evaluation.judge import Verdicts, judge
from statewright.evaluation.losses import losses_into, perplexity, token_losses
from statewright.evaluation.measure import Cost, environment, footprint
from statewright.evaluation.metrics import METRICS, Scores, score
from statewright.evaluation.run import Result, check_positions, evaluate, evaluate_batch
from statewright.evaluation.stories import story_scores
from statewright.intervals import Estimate, estimate, paired

__all__ = [
    "METRICS",
    "Cost",
    "Curve",
    "Estimate",
    "Missing",
    "Plan",
    "Result",
    "Scores",
    "ShortContext",
    "Verdicts",
    "build_bound",
    "byte_curves",
    "check_positions",
    "environment",
    "estimate",
    "evaluate",
    "evaluate_batch",
    "footprint",
    "judge",
    "losses_into",
    "paired",
    "perplexity",
    "run_bytes",
    "run_plan",
    "score",
    "short_context_losses",
    "story_scores",
    "token_losses",
]
