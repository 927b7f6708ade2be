"""Named sets of training options, the defaults of a run that names one."""

from __future__ import annotations

from typing import Any

# StateX's long-context post-training, for a state that was expanded and for its control (the
# same on the model as it was): 524,288 tokens a step, 10.5e9 in all. Masters are float32, where
# the authors' are bfloat16; decay is on matrices only, as in every run of ours.
STATEX: dict[str, Any] = {
    "num_steps": 20_000,
    "num_lanes": 8,
    "length": 65_536,
    "learning_rate": 3e-4,
    "schedule": "cosine",
    "num_warmup_steps": 1_000,
    "final_rate": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "clip": 1.0,
    "checkpointing": True,
}
PRESETS = {"statex": STATEX}
