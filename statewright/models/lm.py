"""The decoder: Hugging Face conventions outside, one State in and one State out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from statewright.hf.cache import StateCache
from statewright.mixers.base import advance_seen
from statewright.models.block import Block, layer_policies, make_norm
from statewright.models.calibration import Norms, read_norms, write_norms
from statewright.models.config import StatewrightConfig
from statewright.models.keywords import LOSS_KEYWORDS, split_keywords
from statewright.models.outputs import StatewrightModelOutput, StatewrightOutput
from statewright.models.shim import write_shim
from statewright.policies import Policy, build_policy
from statewright.shapes import require
from statewright.state import ModelState

_MODEL_KEYWORDS = ("use_cache", "output_hidden_states", "donate")


class StatewrightPreTrainedModel(PreTrainedModel):
    config_class = StatewrightConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every module knows its own initialisation; ours is torch's default, as the paper's."""
        own = list(module.parameters(recurse=False))
        fresh = [p for p in own if not getattr(p, "_is_hf_initialized", False)]
        if fresh and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **kw: Any
    ) -> None:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ValueError(
                "gradient checkpointing with use_reentrant=True gives wrong gradients for a "
                "state, without any error; use use_reentrant=False"
            )
        super().gradient_checkpointing_enable(kwargs, **kw)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            write_shim(save_directory)
            write_norms(self.base_model.norms, save_directory)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.norms = read_norms(path)
        return loaded


class StatewrightModel(StatewrightPreTrainedModel):
    """Embeddings, `num_hidden_layers` blocks and a final norm; without a head."""

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
        **kwargs: Any,
    ) -> StatewrightModelOutput:
        """See `StatewrightForCausalLM.forward`."""
        (flags,) = split_keywords("forward", kwargs, ("donate",))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give exactly one of input_ids and inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = require("forward", "inputs", x, "B T D", D=self.config.hidden_size)
        cache = past_key_values
        if cache is None and use_cache:
            cache = StateCache()
        if cache is not None:
            if not isinstance(cache, StateCache):
                raise ValueError(
                    f"forward: past_key_values is a {type(cache).__name__}, expected a StateCache"
                )
            if state is not None and cache.state is not None:
                raise ValueError("forward: give a state or a cache that holds one, not both")
            state = cache.state if state is None else state
        state = self._check_state(state, B)
        mask = _own_mask(attention_mask, B, T)
        reset = None if reset is None else reset.bool()
        hidden, states = [], []
        chosen = self.config.policy if policy is None else policy
        policies = layer_policies(self.layers, chosen, self.norms)
        for layer, layer_state, own in zip(self.layers, state.layers, policies):
            hidden.append(x)
            if self.gradient_checkpointing and self.training:
                x, new = self._gradient_checkpointing_func(layer, x, layer_state, mask, reset, own)
            else:
                x, new = layer(x, layer_state, mask, reset, own, flags.get("donate", False))
            states.append(new)
        x = self.norm(x)
        new_state = ModelState(layers=tuple(states), seen=advance_seen(state.seen, T, mask, reset))
        if cache is not None:
            cache.advance(new_state, T)
        return StatewrightModelOutput(
            last_hidden_state=x,
            state=new_state,
            past_key_values=cache,
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


class StatewrightForCausalLM(StatewrightPreTrainedModel, GenerationMixin):
    """A causal LM whose only memory is a State; mixers are named by the config.

    `model(ids)` returns `.logits` and `.state`; `model(more, state=state)` continues. Works with
    `generate` (sampling, beams, left padding, `prefill_chunk_size`), `Trainer` and lm-eval.
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
        **kwargs: Any,
    ) -> StatewrightOutput:
        """input_ids (B, T) or inputs_embeds (B, T, D) -> logits, state, and a loss with labels.

        state: where to continue (None: from the start). attention_mask (B, T), or (B, S) with
        S > T whose last T columns count: 0 marks padding, left or right. reset (B, T) bool: a
        document begins at this token. labels (B, T): shifted here, -100 ignored.
        logits_to_keep: only the last that many positions (0: all), or their indices. policy:
        bounds the attention layers; None: the config's; "none": none. donate: the state is given
        away and may be written over (only a Session knows that nobody else holds it).
        Raises ValueError for shapes that do not fit, a state and a filled cache together, or a
        keyword that is not known.
        """
        for_model, for_loss = split_keywords("forward", kwargs, _MODEL_KEYWORDS, LOSS_KEYWORDS)
        out = self.model(
            input_ids,
            state,
            attention_mask,
            reset,
            inputs_embeds,
            past_key_values,
            policy=policy,
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
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """`generate(ids, state=state)`: the ids are the tokens that come after the state."""
        state = model_kwargs.pop("state", None)
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            if state is not None:
                raise ValueError("generate: state= needs use_cache and no past_key_values")
            return
        if state is not None:
            if not isinstance(state, ModelState):
                raise ValueError(f"generate: state is {state!r}, expected a ModelState")
            if state.batch_size != batch_size:
                raise ValueError(
                    f"generate: the state has {state.batch_size} rows, the ids {batch_size}"
                )
            repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
            if repeats > 1:
                state = state.rows(torch.arange(batch_size).repeat_interleave(repeats))
        model_kwargs["past_key_values"] = StateCache(state)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """transformers would feed ids that the cache has already seen a second time, silently."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        given, seen = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
        covered = (
            getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
        )
        if seen and covered == given <= seen and model_kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"generate: input_ids holds {given} tokens, but the cache has seen {seen}; give "
                "all of them followed by the new ones, or the new ones alone with StateCache(state)"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """transformers takes any output called `state` for RWKV's cache; ours is in the cache."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        model_kwargs.pop("state", None)
        return model_kwargs


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
