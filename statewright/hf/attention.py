"""The attention function under which an unmodified transformers model runs with a BoundedCache."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from statewright.hf.arguments import cache_in
from statewright.hf.rotary import note, rotary_modules, undone
from statewright.hf.tokens_read import check_prompt
from statewright.policies.simulate import Rule

NAME = "statewright_bounded"
_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
# What every call would otherwise search for: a model's configs and the end of its position table.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[frozenset, int | None]] = WeakKeyDictionary()
_ACTIVE: ContextVar[Call | None] = ContextVar("statewright_bounded_call", default=None)


@dataclass
class Call:
    """One forward call with a BoundedCache in its arguments.

    ids (B, T), None for embeddings; mask (B, S) bool, whose last T columns are the new tokens;
    configs, the ids of the model's own, whose attention is ours until the call ends; depth, calls
    of a model inside a model; staged, the layers whose new keys wait for their attention.
    """

    cache: Cache
    ids: Tensor | None
    mask: Tensor | None
    configs: frozenset[int]
    module: nn.Module
    depth: int = 1
    staged: list[Any] = field(default_factory=list)


def active_call() -> Call | None:
    return _ACTIVE.get()


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether the model's own code looks attention up in transformers' registry."""
    sources = {type(module).__module__ for module in model.modules()}
    known = [vars(sys.modules[name]) for name in sources if name in sys.modules]
    return any("ALL_ATTENTION_FUNCTIONS" in names for names in known)


def install(model: PreTrainedModel) -> None:
    """Let the model's calls look for a BoundedCache among their arguments, and do nothing else."""
    AttentionInterface.register(NAME, bounded_attention)
    _follow_calls()
    for module in {id(m): m for m in (model, model.base_model)}.values():
        _KNOWN.pop(module, None)
        if _enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    for module in rotary_modules(model):
        if _rotary not in module._forward_hooks.values():
            module.register_forward_hook(_rotary, with_kwargs=True)


@cache
def _follow_calls() -> None:
    """Let a config name our attention within a bounded call of its model, and only there.

    What the config holds is never written, so that calls in other threads read what they did.
    `generate` cuts a prompt by a filled cache's length alone: under ours it is looked at first.
    """
    theirs, prefill = PreTrainedConfig._attn_implementation, GenerationMixin._prefill

    def read(config: PreTrainedConfig) -> Any:
        # A compiled graph cannot ask for the call, and is refused where the call ends.
        call = None if torch.compiler.is_compiling() else _ACTIVE.get()
        return NAME if call is not None and id(config) in call.configs else theirs.fget(config)

    @wraps(prefill)
    def checked(self: Any, input_ids: Tensor, generation_config: Any, given: dict, *args, **kwargs):
        cache = cache_in(given)
        if getattr(cache, "is_bounded", False):
            check_prompt(cache, input_ids, generation_config, given)
        return prefill(self, input_ids, generation_config, given, *args, **kwargs)

    PreTrainedConfig._attn_implementation = property(read, theirs.fset)
    GenerationMixin._prefill = checked


def bounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H * R, T, Dh), key, value (B, H, T, Dh) -> (B, T, H * R, Dv), no weights.

    transformers builds no mask for this function (its name has none): positions and padding come
    from the layer's own state and from the call.
    """
    call = _ACTIVE.get()
    layer = call.staged.pop() if call is not None and call.staged else None
    if call is None or layer is None or layer.new_keys is not key:
        raise ValueError(
            f"BoundedCache: {type(module).__name__} attends to keys that did not come from the "
            "cache's update; this model's attention is not supported"
        )
    if dropout and module.training:
        raise ValueError("BoundedCache: attention dropout is on; call model.eval() first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap, s_aux)
    mask = None if call.mask is None else call.mask[:, call.mask.shape[1] - key.shape[2] :]
    out = layer.attend(query, value, rule, mask)
    return out.transpose(1, 2).contiguous(), None


def _enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = _named(module, args, kwargs)
    cache, call = cache_in(given), _ACTIVE.get()
    if not getattr(cache, "is_bounded", False):
        if call is not None and id(getattr(module, "config", None)) in call.configs:
            # The call that began it was interrupted (Ctrl-C runs no hooks).
            _ACTIVE.set(None)
        return
    if given.get("use_cache") is False:
        raise ValueError(
            "BoundedCache: use_cache=False would feed all tokens again on top of the cache; leave "
            "it out, or give no cache"
        )
    if call is not None and call.cache is cache and module is not call.module:
        call.depth += 1
        return
    ids = given.get("input_ids")
    if ids is not None and ids.shape[1:] == (0,):
        raise ValueError(
            "BoundedCache: no token is new; to go on from a filled cache give generate all ids, "
            "those that it has seen and the new ones, and for another text a new cache"
        )
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "BoundedCache: attention_mask must be None or (B, S) with 1 for a token and 0 for "
            "padding; prepared masks cannot follow tokens that leave"
        )
    if module not in _KNOWN:
        _KNOWN[module] = _configs(module), position_table(module)
    configs, table = _KNOWN[module]
    if table is not None:
        _check_table(table, cache, given, mask)
    _ACTIVE.set(Call(cache, ids, None if mask is None else mask.bool(), configs, module))


def _leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    call = _ACTIVE.get()
    if call is None:
        return
    if cache_in(_named(module, args, kwargs)) is not call.cache:
        return
    call.depth -= 1
    if call.depth:
        return
    _ACTIVE.set(None)
    if call.staged and output is not None:
        raise ValueError(
            f"BoundedCache: {type(module).__name__} computes attention past transformers' "
            "interface, so nothing would be evicted; it is not supported"
        )
    if output is not None:
        call.cache.read.add(call.ids)


def _rotary(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Under a cache that places tokens itself, the model's own rotation is the identity."""
    call = _ACTIVE.get()
    if call is None:
        return None
    if call.cache.probe is not None:
        note(call.cache.probe, module, args, kwargs, output)
    return undone(output) if id(module) in call.cache.undo else None


def position_table(model: nn.Module) -> int | None:
    """The number of learned absolute positions; None for a model that has no such table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    if not args:
        return kwargs
    forward = getattr(module.forward, "__func__", module.forward)
    return {**dict(zip(_parameters(forward), args)), **kwargs}


@cache
def _parameters(forward: Callable) -> list[str]:
    names = list(inspect.signature(forward).parameters)
    return names[1:] if names[:1] == ["self"] else names


def _configs(model: nn.Module) -> frozenset[int]:
    return frozenset(id(config) for m in model.modules() if (config := getattr(m, "config", None)))


def _check_table(limit: int, cache: Any, given: dict, mask: Tensor | None) -> None:
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return
    new = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
    if mask is not None:
        new = mask[:, mask.shape[1] - tokens.shape[1] :].sum(1)
    total = int((cache.tokens_seen(tokens.shape[0], tokens.device) + new).max())
    if total > limit:
        raise ValueError(
            f"BoundedCache: token {total} is beyond the model's {limit} learned positions; a "
            "policy bounds memory, not positions, so this model cannot go on"
        )
