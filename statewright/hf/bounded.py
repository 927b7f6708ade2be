"""A cache that bounds any transformers decoder by a policy, in `generate` and in loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from statewright.hf.attention import active_call, install, uses_interface
from statewright.hf.rotary import Probe, find_turns
from statewright.hf.tokens_read import TokensRead
from statewright.mixers.kv import bounded, empty_list, extend, needs_grad
from statewright.policies import Eviction, Policy, Window, build_policy
from statewright.policies.placement import Placement, check_mode
from statewright.policies.simulate import Rule
from statewright.policies.timeline import Timeline
from statewright.policies.working import WorkingSlots
from statewright.state import KVState

_IDLE = 1 << 20
_LISTS = (DynamicLayer, DynamicSlidingWindowLayer)
_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


def _refuse(name: str, why: str) -> Callable[..., NoReturn]:
    def refuse(self: Cache, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(f"BoundedCache.{name}: {why}")

    return refuse


class BoundedLayer(CacheLayerMixin):
    """One layer's KVState, replaced (never written to) by every call.

    Padded columns are not stored. `num_columns` counts them nevertheless, as transformers slices
    ids and masks by it; `state.seen` counts each row's tokens. block: see `extend`; 0 for dense.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, policy: Eviction, block: int) -> None:
        self.policy, self.block = policy, block
        self.placement: Placement | None = None
        self.num_columns = 0
        self._state: KVState | None = None
        self._working: WorkingSlots | None = None
        self.new_keys: Tensor | None = None

    @property
    def state(self) -> KVState | None:
        """The list as a value; None before the first call."""
        return self._state if self._working is None else self._working.state()

    @state.setter
    def state(self, value: KVState | None) -> None:
        self._state, self._working = value, None

    @property
    def keys(self) -> Tensor | None:
        return None if self.state is None else self.state.k

    @property
    def values(self) -> Tensor | None:
        return None if self.state is None else self.state.v

    @property
    def is_initialized(self) -> bool:
        return self._state is not None or self._working is not None

    @property
    def seen(self) -> Tensor | None:
        """(B,): unmasked tokens of each row."""
        holder = self._working or self._state
        return None if holder is None else holder.seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, H, _, key = key_states.shape
        value, dtype, device = value_states.shape[-1], key_states.dtype, key_states.device
        self.state = empty_list(B, H, key, value, dtype, device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Only announces the new keys; the attention that follows stores and evicts."""
        call = active_call()
        if call is None or not any(layer is self for layer in call.cache.layers):
            raise ValueError(
                "BoundedCache.update: used outside a call of the model that it was built for; pass "
                "it as past_key_values to that model"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.new_keys = key_states
        call.staged.append(self)
        return key_states, value_states

    def attend(self, query: Tensor, value: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
        """Attend to what is kept and to the new tokens, then keep what the policy says."""
        key = self.new_keys
        assert key is not None
        T = key.shape[2]
        self.num_columns += T
        self.new_keys = None
        if self.placement is not None:
            rule = replace(rule, placement=self.placement)
        if T == 1 and (mask is None or bool(mask.all())) and not needs_grad(query, key, value):
            working = self._ready(key, value, rule)
            if working is not None:
                return working.step(query, key, value, rule)
        state = self.state
        assert state is not None
        timeline = Timeline.of(state.pos, state.seen, T, mask, None)
        block = T if self.block == 0 else self.block
        out, self.state = extend(query, key, value, state, timeline, rule, self.policy, block)
        return out

    def _ready(self, key: Tensor, value: Tensor, rule: Rule) -> WorkingSlots | None:
        """The workspace for single tokens, once the list is full; None if it does not apply."""
        if self._working is None:
            state = self._state
            assert state is not None
            policy = bounded(self.policy, state, key, value)
            if WorkingSlots.fits(policy, state, rule):
                self._state, self._working = None, WorkingSlots(policy, state, rule)
        return self._working

    def get_seq_length(self) -> int:
        """Columns fed, not slots kept: positions and slicing go by it."""
        return self.num_columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0
        if self._working is not None:
            kept = self._working.count
        elif self._state is not None:
            kept = self._state.pos.shape[-1]
        return kept + query_length, self.num_columns - kept

    def reset(self) -> None:
        self.state, self.num_columns, self.new_keys = None, 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen is not None:
            self._rows(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, *args: object, **kwargs: object) -> None:
        raise ValueError(
            "BoundedCache.crop: tokens that have left cannot come back; deepcopy the cache before "
            "and go on from the copy (assisted decoding needs cropping and is not supported)"
        )

    def _rows(self, index: Tensor) -> None:
        if self._working is not None:
            self._working = self._working.rows(index)
        elif self._state is not None:
            self._state = self._state.rows(index)


class BoundedHybridLayer(LinearAttentionLayer, BoundedLayer):
    """A layer with a recurrent state, left untouched, beside a bounded list (Falcon-H1, Zamba2)."""

    is_compileable = False

    def __init__(self, policy: Eviction, block: int, **kwargs: int) -> None:
        BoundedLayer.__init__(self, policy, block)
        LinearAttentionLayer.__init__(self, **kwargs)

    def lazy_initialization(self, *args: Tensor, **kwargs: Tensor) -> None:
        kind = BoundedLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        BoundedLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        BoundedLayer.reorder_cache(self, beam_idx)

    def crop(self, *args: object, **kwargs: object) -> None:
        BoundedLayer.crop(self)


class BoundedCache(Cache):
    """`model.generate(..., past_key_values=BoundedCache(model, TOVA(512)))`: memory <= the budget
    (`cache=` since transformers 5.24, which deprecates the older name).

    policy: an Eviction or its spec. prefill: how a call with several tokens evicts: "exact", as
    token by token (the paper's definition, arXiv:2401.06104, appendix E); "chunk:c", after every c
    tokens; "dense", the authors' release: the whole prompt attends to itself, then one eviction.
    positions: "original", or "renumbered" or "compressed" (see `Placement`): rotary models only,
    keys are stored un-rotated and policies that look at keys see them so. The model is not
    changed; calls without this cache are as before; recurrent layers of hybrids are untouched.
    To go on with a filled cache give `generate` all ids so far (or the new ones with a longer
    attention_mask); another text is refused, where ids can be seen (not from inputs_embeds): call
    `reset()` first. A plain call reads its ids as new ones, whatever they are. Raises ValueError
    for a policy that does not bound lists and for a model whose attention, cache layers or
    positions we cannot follow (Bloom, MPT, Falcon, before 5.24 GPT-J and CodeGen: nothing tells a
    policy what their own code attends to; their biases and masks go by slot, not by token).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=64)
    >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    >>> cache = BoundedCache(llama, "tova:budget=16")
    >>> ids = llama.generate(torch.randint(64, (1, 40)), past_key_values=cache, max_new_tokens=5)
    >>> [state.pos.shape[-1] for state in cache.states]
    [16, 16]
    """

    is_bounded = True

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | str,
        prefill: str = "exact",
        positions: str = "original",
    ) -> None:
        chosen = build_policy(policy)
        if not isinstance(chosen, Eviction):
            raise ValueError(f"BoundedCache: policy={policy!r}, expected one that evicts")
        self.policy, self.prefill = chosen, prefill
        block = _block(prefill)
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"BoundedCache: {type(model).__name__} is no decoder-only model")
        if not uses_interface(model):
            raise ValueError(
                f"BoundedCache: {type(model).__name__} computes attention past transformers' "
                "interface, so a policy could not evict; it is not supported"
            )
        theirs = DynamicCache(config=config).layers
        lists = [isinstance(layer, (*_LISTS, *_BOTH)) for layer in theirs]
        own = [chosen.for_layer(sum(lists[:i]), sum(lists)) for i in range(len(lists))]
        super().__init__(layers=[_layer(t, p, block) for t, p in zip(theirs, own)])
        install(model)
        self.read = TokensRead()
        self.positions = check_mode(positions, "BoundedCache")
        self.probe: Probe | None = None
        self.undo: frozenset[int] = frozenset()
        if positions != "original":
            self._place(model)

    def _place(self, model: PreTrainedModel) -> None:
        """Let every layer with rotary positions place its tokens itself."""
        turns, self.undo = find_turns(model, lambda: BoundedCache(model, Window(_IDLE)))
        lists = [layer for layer in self.layers if isinstance(layer, BoundedLayer)]
        for layer, turn in zip(lists, turns, strict=True):
            if turn is not None:
                layer.placement = Placement(self.positions, turn)

    @property
    def states(self) -> list[KVState | None]:
        """Each layer's list; None for a layer that has none, or before the first call."""
        return [getattr(layer, "state", None) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all lists, positions and scores included."""
        return sum(state.nbytes for state in self.states if state is not None)

    def tokens_seen(self, batch_size: int, device: torch.device) -> Tensor:
        """(B,): unmasked tokens each row has fed."""
        lists = (layer for layer in self.layers if isinstance(layer, BoundedLayer))
        found = next((layer.seen for layer in lists if layer.is_initialized), None)
        return torch.zeros(batch_size, dtype=torch.long, device=device) if found is None else found

    def reset(self) -> None:
        super().reset()
        self.read = TokensRead()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.read.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.read.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.read.select(torch.arange(self.read.num_rows).repeat_interleave(repeats))

    def crop(self, *args: object, **kwargs: object) -> None:
        raise ValueError(
            "BoundedCache.crop: tokens that have left cannot come back; deepcopy the cache before "
            "and go on from the copy (assisted decoding needs cropping and is not supported)"
        )

    offload = _refuse("offload", "a bounded list is small and stays where its model is")
    prefetch = _refuse("prefetch", "nothing is offloaded")
    __iter__ = _refuse("__iter__", "read cache.states, which says what positions were kept")


def _block(prefill: str) -> int:
    kind, _, size = prefill.partition(":")
    if prefill == "exact":
        return 1
    if prefill == "dense":
        return 0
    if kind == "chunk" and size.isdigit() and int(size) > 0:
        return int(size)
    raise ValueError(f"BoundedCache: prefill={prefill!r}, expected 'exact', 'chunk:C' or 'dense'")


def _layer(theirs: Any, policy: Eviction, block: int) -> Any:
    if type(theirs) in _LISTS:
        return BoundedLayer(policy, block)
    if type(theirs) in _BOTH:
        return BoundedHybridLayer(policy, block, number_of_states=theirs.number_of_states)
    if type(theirs) in (LinearAttentionLayer, DummyLayer):
        return theirs
    raise ValueError(
        f"BoundedCache: the model's cache has a {type(theirs).__name__}, not supported"
    )
