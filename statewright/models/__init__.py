"""One decoder for every mixer, with Hugging Face conventions."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from statewright.models.config import StatewrightConfig
from statewright.models.lm import StatewrightForCausalLM, StatewrightModel, StatewrightOutput
from statewright.models.load import load

AutoConfig.register("statewright", StatewrightConfig)
AutoModel.register(StatewrightConfig, StatewrightModel)
AutoModelForCausalLM.register(StatewrightConfig, StatewrightForCausalLM)

__all__ = [
    "StatewrightConfig",
    "StatewrightForCausalLM",
    "StatewrightModel",
    "StatewrightOutput",
    "load",
]
