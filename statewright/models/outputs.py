"""What a call of the decoder returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from statewright.hf.arguments import CACHE
from statewright.hf.cache import StateCache
from statewright.state import ModelState


@dataclass
class StatewrightOutput(ModelOutput):
    """loss (), logits (B, T, vocabulary), state, and the cache if one was used.

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> out = model(torch.randint(256, (1, 20)))
    >>> out.logits.shape, out.state.seen
    (torch.Size([1, 20, 257]), tensor([20]))
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: ModelState | None = None
    # generate looks the cache up under the installed transformers' name; both names read it.
    if CACHE == "cache":
        cache: StateCache | None = None
    else:
        past_key_values: StateCache | None = None
        # A property is no field.
        cache = property(lambda self: self.past_key_values)  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class StatewrightModelOutput(ModelOutput):
    """last_hidden_state (B, T, D), state, and the cache if one was used."""

    last_hidden_state: Tensor | None = None
    state: ModelState | None = None
    # generate looks the cache up under the installed transformers' name; both names read it.
    if CACHE == "cache":
        cache: StateCache | None = None
    else:
        past_key_values: StateCache | None = None
        # A property is no field.
        cache = property(lambda self: self.past_key_values)  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
