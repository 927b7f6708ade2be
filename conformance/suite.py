"""transformers' conformance mixins on our decoder, a class per mixer; run.py collects this file.

The mixins come from transformers' own source, which run.py puts on the path as `tests`; no line
of it is ours. Its exporters' tests are left out (ONNX, ExecuTorch and others; docs/conformance.md).
"""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from statewright import laws
from statewright.hf.cache import StateCache
from statewright.mixers import MIXERS
from statewright.models import StatewrightConfig, StatewrightForCausalLM, StatewrightModel


def _without(module: str, mixin: str) -> None:
    """An empty mixin in the place of a module of transformers' tests."""
    parent, empty = module.rpartition(".")[0], types.ModuleType(module)
    setattr(empty, mixin, type(mixin, (), {}))
    sys.modules |= {parent: types.ModuleType(parent), module: empty}


_without("tests.exporters.test_export", "ExportTesterMixin")
if importlib.util.find_spec("tests.generation") is None:  # a source distribution lacks it
    _without("tests.generation.test_utils", "GenerationTesterMixin")

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402

# The mixins ask these tables which class has labels and which is a body without a head.
MODEL_MAPPING_NAMES["statewright"] = StatewrightModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["statewright"] = StatewrightForCausalLM.__name__

SPECS: dict[str, str | list[str]] = {name: name for name in MIXERS} | {
    "mamba2": "mamba2:head_dim=16",
    "hybrid": ["mingru", "attention"],
}


class Sizes:
    """Configurations and inputs of the sizes that transformers' own testers use."""

    batch_size, seq_length, hidden_size, num_hidden_layers, vocab_size = 4, 7, 32, 2, 99
    num_attention_heads = 4
    is_training = True

    def __init__(self, mixer: str | list[str]) -> None:
        self.mixer = mixer

    def get_config(self) -> StatewrightConfig:
        return StatewrightConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            mixer=self.mixer,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[StatewrightConfig, dict]:
        """Row i has i tokens of padding, on the left as transformers asks of a decoder."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).triu()}


class Conformance(ModelTesterMixin, GenerationTesterMixin):
    """What transformers asks a model's own tests to say; attention weights are never returned."""

    all_model_classes = (StatewrightModel, StatewrightForCausalLM)
    has_attentions = False
    mixer: str | list[str]

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = Sizes(self.mixer)

    def _check_caches_are_equal(self, cache1: StateCache, cache2: StateCache) -> None:
        """transformers asks caches with layers of their own kind to compare themselves."""
        assert len(cache1) == len(cache2) and cache1.get_seq_length() == cache2.get_seq_length()
        tolerance = laws.TOLERANCES[torch.float32, "torch"]
        assert laws.error(cache1.state, cache2.state) < tolerance

    def test_left_padding_compatibility(self) -> None:
        """Skipped for models without attention weights, though padding is none of these."""
        self.has_attentions = True
        super().test_left_padding_compatibility()


if not hasattr(GenerationTesterMixin, "test_left_padding_compatibility"):
    del Conformance.test_left_padding_compatibility

for _name, _mixer in SPECS.items():
    _class = type(f"Test_{_name}", (Conformance, unittest.TestCase), {"mixer": _mixer})
    globals()[_class.__name__] = _class
del _class
