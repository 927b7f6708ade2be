"""A transformers cache as a State, and back: the only code that knows transformers' caches.

transformers' caches are written to in place; a State never is. So everything read is cloned, and
every cache written is a fresh one: forks, snapshots and files of States need no care.

| in transformers | in a State |
|---|---|
| linear-attention layer: `recurrent_states[i]`, `conv_states[i]` | `MatrixState` S, taps in extra |
| attention layer, full or sliding: `keys`, `values` | `KVState` |
| a layer of a BoundedCache | its `KVState`, positions and scores included |
| a layer with both, or with several | a tuple of states |
| RWKV's list of five tensors, xLSTM's and MiniMax's own caches | one state per layer |
| anything else | `OpaqueState`: sized, saved, forked and restored, not interpreted |
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from statewright.hf.bounded import BoundedCache, BoundedLayer
from statewright.hf.opaque import read_opaque, tensors_in, write_opaque
from statewright.state import KVState, MatrixState, ModelState, OpaqueState, State, VectorState

# Families whose recurrent state is (B, H, V, K): the value axis first, as in Mamba-2's paper.
_VALUE_FIRST = {
    "mamba2",
    "zamba",
    "zamba2",
    "bamba",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
}
_KNOWN_LAYERS = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}
_CONV = "conv"
_RWKV = ("ffn_shift", "shift", "numerator", "denominator", "maximum")


def read_state(cache: Any, config: Any, seen: int | Tensor | None = None) -> ModelState:
    """What a cache (or RWKV's list) holds, cloned; one state, or a tuple of them, per layer.

    `config` is the model's. `seen`: tokens read so far, an int or (B,); by default what the cache
    counts. Raises ValueError if nothing has been read, or for a cache that counts no tokens
    (recurrent layers alone) without `seen`.
    """
    B, device = _rows_of(cache)
    seen = _seen_of(cache, B, device, seen)
    if isinstance(cache, (list, tuple)) and len(cache) == len(_RWKV):
        return ModelState(layers=_read_rwkv(cache, seen), seen=seen)
    if hasattr(cache, "rnn_state"):
        return ModelState(layers=_read_xlstm(cache, seen), seen=seen)
    if hasattr(cache, "linear_cache"):
        return ModelState(layers=_read_minimax(cache, seen), seen=seen)
    known = type(cache) is DynamicCache and {type(la) for la in cache.layers} <= _KNOWN_LAYERS
    if known or isinstance(cache, BoundedCache):
        value_first = _model_type(config) in _VALUE_FIRST
        layers = tuple(_read_layer(layer, seen, value_first) for layer in cache.layers)
        return ModelState(layers=layers, seen=seen)
    return ModelState(layers=(read_opaque(cache, seen),), seen=seen)


def write_state(state: ModelState, model: nn.Module, kind: Any = None) -> Any:
    """A fresh cache for `model` that holds the state; None for a state that has seen nothing.

    `kind`: any filled cache of this model with as many rows, the structure that an OpaqueState is
    restored into; or an unused BoundedCache, to be copied and filled (the lists are then bounded
    by its policy, and a state that has seen nothing gives an empty one). Raises ValueError where
    the state does not fit the model.
    """
    bounded = copy.deepcopy(kind) if isinstance(kind, BoundedCache) else None
    if not state.layers:
        return bounded
    layers = state.layers
    if isinstance(layers[0], OpaqueState) and len(layers) == 1 and layers[0].extra:
        if kind is None:
            raise ValueError("write_state: an OpaqueState needs `kind`, a cache of this model")
        return write_opaque(layers[0], kind)
    config = model.config.get_text_config(decoder=True)
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"write_state: the state has {len(layers)} layers, the model {config.num_hidden_layers}"
        )
    writer = _WRITERS.get(config.model_type)
    if writer is not None and bounded is None:
        return writer(layers, model)
    cache = DynamicCache(config=model.config) if bounded is None else bounded
    value_first = config.model_type in _VALUE_FIRST
    if not cache.layers:
        cache.layers = [DynamicLayer() for _ in layers]
    for target, layer in zip(cache.layers, layers, strict=True):
        _write_layer(target, layer, value_first)
    return cache


def has_own_cache(model: nn.Module) -> bool:
    """Whether the model takes no other cache than its family's own."""
    return _model_type(model.config) in _WRITERS


def kinds_of(state: State) -> dict[str, int]:
    """Bytes by kind: `kv`, `recurrent`, `conv`, `other` (not decoded), and `positions`.

    Positions are our own bookkeeping (`pos`, `seen`): a host's cache does not hold them.
    """
    found = dict.fromkeys(("kv", "recurrent", "conv", "other", "positions"), 0)
    if isinstance(state, ModelState):
        found["positions"] += state.seen.nbytes
    for part in _parts(state):
        for name, tensor in part.items():
            found[_kind(part, name)] += tensor.numel() * tensor.element_size()
    return found


def _kind(part: State, name: str) -> str:
    if name in ("seen", "pos"):
        return "positions"
    if name == f"extra.{_CONV}" or name.endswith("taps"):
        return "conv"
    if isinstance(part, KVState):
        return "kv"
    return "other" if isinstance(part, OpaqueState) else "recurrent"


def _parts(state: Any) -> list[State]:
    if isinstance(state, tuple):
        return [part for inner in state for part in _parts(inner)]
    return _parts(state.layers) if isinstance(state, ModelState) else [state]


def _model_type(config: Any) -> str:
    return config.get_text_config(decoder=True).model_type


def _rows_of(cache: Any) -> tuple[int, torch.device]:
    """The batch size and the device, from the first tensor that was read into the cache."""
    if hasattr(cache, "rnn_state"):
        tensors = [cache.rnn_state[0][0]]
    elif isinstance(cache, (list, tuple)):
        tensors = [t for t in cache if isinstance(t, Tensor)]
    else:
        tensors = [t for layer in getattr(cache, "layers", ()) for t in _layer_tensors(layer)]
        tensors += [t for t in getattr(cache, "linear_cache", ()) if isinstance(t, Tensor)]
        tensors = tensors or tensors_in(cache)
    if not tensors:
        raise ValueError(f"read_state: this {type(cache).__name__} has read nothing yet")
    return tensors[0].shape[0], tensors[0].device


def _layer_tensors(layer: Any) -> list[Tensor]:
    found = [getattr(layer, "keys", None)]
    for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
        found += states.values()
    return [t for t in found if isinstance(t, Tensor) and t.numel()]


def _seen_of(cache: Any, B: int, device: torch.device, seen: int | Tensor | None) -> Tensor:
    if seen is None:
        try:
            seen = cache.get_seq_length()
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"read_state: a {type(cache).__name__} of recurrent layers counts no tokens; "
                "give seen="
            ) from error
    if isinstance(seen, Tensor) and seen.dim():
        return seen.to(device, torch.int64).clone()
    return torch.full((B,), int(seen), dtype=torch.int64, device=device)


def _read_layer(layer: Any, seen: Tensor, value_first: bool) -> State | tuple[State, ...]:
    parts: list[State] = []
    if isinstance(layer, LinearAttentionLayer):
        for i in range(layer.number_of_states):
            recurrent = (
                layer.recurrent_states[i] if layer.is_recurrent_states_initialized[i] else None
            )
            conv = layer.conv_states[i] if layer.is_conv_states_initialized[i] else None
            parts.append(_linear(recurrent, conv, seen, value_first))
    if isinstance(layer, BoundedLayer) and layer.state is not None:
        parts.append(layer.state)
    elif isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.numel():
        parts.append(_key_values(layer.keys, layer.values, seen))
    if not parts:
        return OpaqueState(seen=seen)
    return parts[0] if len(parts) == 1 else tuple(parts)


def _linear(
    recurrent: Tensor | None, conv: Tensor | None, seen: Tensor, value_first: bool = False
) -> State:
    if recurrent is None:
        state: State = OpaqueState(seen=seen)
    elif recurrent.dim() == 4:
        S = recurrent.transpose(2, 3) if value_first else recurrent
        state = MatrixState(S=_copy(S), seen=seen)
    elif recurrent.dim() == 3:  # Mamba: one value per channel
        state = MatrixState(S=_copy(recurrent.unsqueeze(3)), seen=seen)
    else:
        state = VectorState(h=_copy(recurrent), seen=seen)
    if conv is not None:
        state = state.with_extra(_CONV, _copy(conv), "batch channel width")
    return state


def _key_values(keys: Tensor, values: Tensor, seen: Tensor) -> KVState:
    slots = torch.arange(keys.shape[2], device=seen.device) - keys.shape[2]
    pos = (seen[:, None, None] + slots).expand(*keys.shape[:3]).clamp(min=-1)
    return KVState(k=_copy(keys), v=_copy(values), pos=_copy(pos), seen=seen)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _write_layer(target: Any, state: State | tuple[State, ...], value_first: bool) -> None:
    parts = state if isinstance(state, tuple) else (state,)
    linear = [part for part in parts if not isinstance(part, KVState)]
    if isinstance(target, LinearAttentionLayer):
        for i, part in enumerate(linear):
            _write_linear(target, i, part, value_first)
    for part in parts:
        if isinstance(part, KVState):
            _write_key_values(target, part)


def _write_linear(target: LinearAttentionLayer, i: int, part: State, value_first: bool) -> None:
    conv, recurrent = part.extra.get(_CONV), _recurrent(part, value_first)
    if conv is not None:
        target.conv_states[i] = _copy(conv)
        target.is_conv_states_initialized[i] = True
        target.conv_kernel_size[i] = conv.shape[-1]
        target.dtype, target.device = conv.dtype, conv.device
    if recurrent is not None:
        target.recurrent_states[i] = _copy(recurrent)
        target.is_recurrent_states_initialized[i] = True
        if target.device is None:
            target.dtype, target.device = recurrent.dtype, recurrent.device
    target.has_previous_state[i] = conv is not None or recurrent is not None


def _recurrent(part: State, value_first: bool) -> Tensor | None:
    if isinstance(part, VectorState):
        return part.h
    if not isinstance(part, MatrixState):
        return None
    if part.S.shape[3] == 1 and not value_first:
        return part.S.squeeze(3)
    return part.S.transpose(2, 3) if value_first else part.S


def _write_key_values(target: Any, part: KVState) -> None:
    if isinstance(target, BoundedLayer):
        target.state, target.num_columns = part, int(part.seen.max())
        return
    DynamicLayer.lazy_initialization(target, part.k, part.v)
    if isinstance(target, DynamicSlidingWindowLayer):
        target._sliding_window_tensor = target._sliding_window_tensor.to(part.k.device)
        target.cumulative_length = int(part.seen.max())
    target.keys, target.values = _copy(part.k), _copy(part.v)


def _read_rwkv(cache: Any, seen: Tensor) -> tuple[State, ...]:
    """(B, D, L) each; the exponent-weighted sums are the state, the last inputs are its taps."""
    layers = []
    for i in range(cache[0].shape[2]):
        named = {name: _copy(t[:, :, i]) for name, t in zip(_RWKV, cache)}
        h = named.pop("numerator")
        axes = dict.fromkeys(named, ("batch", "channel"))
        layers.append(VectorState(h=h, seen=seen, extra=named, extra_axes=axes))
    return tuple(layers)


def _write_rwkv(layers: tuple[State, ...], model: nn.Module) -> list[Tensor]:
    def of(layer: State, name: str) -> Tensor:
        return layer.h if name == "numerator" else layer.extra[name]

    return [torch.stack([of(layer, name) for layer in layers], 2) for name in _RWKV]


def _read_xlstm(cache: Any, seen: Tensor) -> tuple[State, ...]:
    """mLSTM: matrix C (B, H, K, V), normaliser n (B, H, K), stabiliser m (B, H, 1)."""
    axes = {"n": ("batch", "head", "key"), "m": ("batch", "head", "one")}
    layers = []
    for i in range(len(cache.rnn_state)):
        C, n, m = (_copy(t) for t in cache.rnn_state[i])
        layers.append(MatrixState(S=C, seen=seen, extra={"n": n, "m": m}, extra_axes=axes))
    return tuple(layers)


def _write_xlstm(layers: tuple[State, ...], model: nn.Module) -> Any:
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache

    S = layers[0].S
    cache = xLSTMCache(model.config, S.shape[0], dtype=S.dtype, device=S.device)
    for i, layer in enumerate(layers):
        cache.rnn_state[i] = tuple(_copy(t) for t in (layer.S, layer.extra["n"], layer.extra["m"]))
    cache.seqlen_offset += int(layers[0].seen.max())
    cache.rnn_state_initial = False
    return cache


def _read_minimax(cache: Any, seen: Tensor) -> tuple[State, ...]:
    layers = []
    for i in range(len(cache)):
        linear = cache.linear_cache[i] if i < len(cache.linear_cache) else []
        if isinstance(linear, Tensor):
            layers.append(_linear(linear, None, seen))
        else:
            layers.append(_read_layer(cache.layers[i], seen, False))
    return tuple(layers)


def _write_minimax(layers: tuple[State, ...], model: nn.Module) -> Any:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    cache = MiniMaxCache()
    for i, layer in enumerate(layers):
        cache.layers.append(DynamicLayer())
        if isinstance(layer, KVState):
            _write_key_values(cache.layers[i], layer)
            cache.set_linear_cache(i, [])
        else:
            cache.set_linear_cache(i, _copy(layer.S))
    return cache


_WRITERS = {"rwkv": _write_rwkv, "xlstm": _write_xlstm, "minimax": _write_minimax}
