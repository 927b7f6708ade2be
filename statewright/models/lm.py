"""The decoder: Hugging Face conventions outside, one State in and one State out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from statewright.hf.arguments import CACHE
from statewright.hf.cache import StateCache
from statewright.mixers.base import advance_seen
from statewright.models.block import Block, layer_policies, make_norm
from statewright.models.calibration import Norms
from statewright.models.config import StatewrightConfig
from statewright.models.generation import StateGenerationMixin
from statewright.models.keywords import (
    FLAGS,
    LOSS_KEYWORDS,
    MODEL_KEYWORDS,
    PACKING_KEYWORDS,
    refuse_attentions,
    split_keywords,
)
from statewright.models.outputs import StatewrightModelOutput, StatewrightOutput
from statewright.models.packing import Call, document_starts
from statewright.models.pretrained import StatewrightPreTrainedModel
from statewright.policies import Policy, build_policy
from statewright.shapes import require
from statewright.state import ModelState


class StatewrightModel(StatewrightPreTrainedModel):
    """Embeddings, `num_hidden_layers` blocks and a final norm; without a head.

    >>> model = StatewrightModel(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> model(torch.randint(256, (1, 20))).last_hidden_state.shape
    torch.Size([1, 20, 8])
    """

    def __init__(self, config: StatewrightConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.norms: Norms | None = None
        if build_policy(config.policy) is not None:
            message = (
                f"the config bounds this model by default: {config.policy}; policy='none' does not"
            )
            warnings.warn(message, stacklevel=3)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def init_state(self, batch_size: int) -> ModelState:
        """The state of `batch_size` rows that have seen nothing."""
        return self._gather([layer.init_state(batch_size) for layer in self.layers])

    def random_state(self, batch_size: int, generator: torch.Generator) -> ModelState:
        """A valid state as if some tokens had been seen, for tests of the laws."""
        return self._gather([layer.random_state(batch_size, generator) for layer in self.layers])

    def _gather(self, states: list) -> ModelState:
        return ModelState(layers=tuple(states), seen=states[0].seen)

    def step(
        self,
        x: Tensor,
        state: ModelState,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """One token: ids (B,) or embeddings (B, D) -> hidden (B, D) and the next state."""
        x = x if x.is_floating_point() else self.embeddings(x)
        states = []
        chosen = self.config.policy if policy is None else policy
        policies = layer_policies(self.layers, chosen, self.norms)
        for layer, layer_state, own in zip(self.layers, state.layers, policies):
            x, layer_state = layer.step(x, layer_state, mask, reset, own)
            states.append(layer_state)
        return self.norm(x), self._gather(states)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        reset: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        policy: Policy | str | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> StatewrightModelOutput:
        """See `StatewrightForCausalLM.forward`."""
        packing, flags = split_keywords("forward", kwargs, PACKING_KEYWORDS, FLAGS)
        refuse_attentions(flags.get("output_attentions"), self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give exactly one of input_ids and inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = require("forward", "inputs", x, "B T D", D=self.config.hidden_size)
        cache = _one(cache, past_key_values)
        given = _held(cache, state)
        fresh, state = given is None, self._check_state(given, B)
        mask = _own_mask(attention_mask, B, T)
        fed = None if cache is None else cache.num_tokens
        call = Call(B, T, mask, state.seen, fed, fresh)
        reset = document_starts(reset, position_ids, packing, call)
        hidden, states = [], []
        chosen = self.config.policy if policy is None else policy
        policies = layer_policies(self.layers, chosen, self.norms)
        for layer, layer_state, own in zip(self.layers, state.layers, policies):
            if output_hidden_states:
                hidden.append(x)
            x, new = layer(x, layer_state, mask, reset, own, flags.get("donate", False))
            states.append(new)
        x = self.norm(x)
        new_state = ModelState(layers=tuple(states), seen=advance_seen(state.seen, T, mask, reset))
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = StateCache()
        if cache is not None:
            cache.advance(new_state, T, input_ids)
        return StatewrightModelOutput(
            last_hidden_state=x,
            state=new_state,
            **{CACHE: cache},
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )

    def _check_state(self, state: ModelState | None, batch_size: int) -> ModelState:
        if state is None:
            return self.init_state(batch_size)
        if not isinstance(state, ModelState) or len(state.layers) != len(self.layers):
            raise ValueError(
                f"forward: state is {state!r}, expected a ModelState of {len(self.layers)} layers"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"forward: the state has {state.batch_size} rows, the input {batch_size}; "
                "state.rows([...]) selects or repeats rows"
            )
        return state


class StatewrightForCausalLM(StatewrightPreTrainedModel, StateGenerationMixin):
    """A causal LM whose only memory is a State; mixers are named by the config.

    `model(ids)` returns `.logits` and `.state`; `model(more, state=state)` continues. Works with
    `generate` (sampling, beams, left padding, `prefill_chunk_size`), `Trainer` and lm-eval.

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> out = model(torch.randint(256, (1, 20)))
    >>> model(torch.randint(256, (1, 5)), state=out.state).state.seen
    tensor([25])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: StatewrightConfig) -> None:
        super().__init__(config)
        self.model = StatewrightModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def init_state(self, batch_size: int) -> ModelState:
        return self.model.init_state(batch_size)

    def random_state(self, batch_size: int, generator: torch.Generator) -> ModelState:
        return self.model.random_state(batch_size, generator)

    def step(
        self,
        x: Tensor,
        state: ModelState,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        policy: Policy | str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """One token: ids (B,) or embeddings (B, D) -> logits (B, vocabulary), state."""
        x, state = self.model.step(x, state, mask, reset, policy)
        return self.lm_head(x), state

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        state: ModelState | None = None,
        attention_mask: Tensor | None = None,
        reset: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: StateCache | None = None,
        logits_to_keep: int | Tensor = 0,
        policy: Policy | str | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        **kwargs: Any,
    ) -> StatewrightOutput:
        """input_ids (B, T) or inputs_embeds (B, T, D) -> logits, state, and a loss with labels.

        state: where to continue (None: from the start). attention_mask (B, T), or (B, S) with
        S > T whose last T columns count: 0 marks padding, left or right. reset (B, T) bool: a
        document begins at this token; position_ids, seq_idx or cu_seq_lens_q say the same as
        `packing.document_starts` reads them. labels (B, T): shifted here, -100 ignored.
        logits_to_keep: only the last that many positions (0: all), or their indices. policy: see
        `policies`; None: the config's; "none": none. donate: the state is given away and may be
        written over. Raises ValueError for shapes that do not fit, a state and a filled cache
        together, or a keyword that is not known.
        """
        for_model, for_loss = split_keywords("forward", kwargs, MODEL_KEYWORDS, LOSS_KEYWORDS)
        out = self.model(
            input_ids,
            state,
            attention_mask,
            reset,
            inputs_embeds,
            past_key_values,
            policy=policy,
            position_ids=position_ids,
            cache=cache,
            return_dict=True,
            **for_model,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **for_loss)
        return StatewrightOutput(
            loss=loss,
            logits=logits,
            state=out.state,
            **{CACHE: out.cache},
            hidden_states=out.hidden_states,
        )


def _one(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """transformers renames the argument in 5.24; whoever calls us may know either name."""
    if cache is not None and past_key_values is not None:
        raise ValueError("forward: cache and past_key_values are one argument; give one of them")
    return past_key_values if cache is None else cache


def _held(cache: Cache | None, state: ModelState | None) -> ModelState | None:
    """The state to go on from: the one given or the cache's."""
    if cache is None:
        return state
    if not isinstance(cache, StateCache):
        raise ValueError(f"forward: the cache is a {type(cache).__name__}, expected a StateCache")
    if state is not None and cache.state is not None:
        raise ValueError("forward: give a state or a cache that holds one, not both")
    return cache.state if state is None else state


def _own_mask(attention_mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """The last T columns as bool (B, T)."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != B or shape[1] < T:
        raise ValueError(
            f"forward: attention_mask is {shape}, expected (B, S) with B = {B}, S >= T = {T}"
        )
    return attention_mask[:, shape[1] - T :].bool()
