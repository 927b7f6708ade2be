"""Any Python object that holds tensors, as an OpaqueState, and back into an object of its kind.

What a cache of an unknown class carries is found by walking its attributes, lists and dicts. Its
structure is not saved: an object of the same kind, made by running the model on one token, is
filled in again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statewright.state import OpaqueState

# How a value lies in the object; in a State the batch is every tensor's first axis.
_ROWS, _SECOND, _SHARED, _COUNT = "rows", "second", "shared", "count"
# What says how the object was built rather than what it has read.
_SKIPPED = (torch.device, torch.dtype, str, bytes, type(None))


def read_opaque(source: Any, seen: Tensor) -> OpaqueState:
    """Every tensor and count inside `source`, cloned; seen (B,) int64.

    A name is `how:path`, e.g. `rows:layers.0.keys`. Tensors without a batch axis, and Python
    counts, are repeated for each row.
    """
    extra, axes = {}, {}
    for path, value in _leaves(source):
        how, tensor = _batch_first(value, seen)
        extra[f"{how}:{path}"] = tensor
        axes[f"{how}:{path}"] = ("batch", *(f"axis{i}" for i in range(1, tensor.dim())))
    return OpaqueState(seen=seen, extra=extra, extra_axes=axes)


def write_opaque(state: OpaqueState, kind: Any) -> Any:
    """A copy of `kind`, an object of the kind that was read, holding the state's values.

    Raises ValueError if the object has no place for one of them.
    """
    filled = copy.deepcopy(kind)
    places = dict(_leaves(filled))
    for name, tensor in state.extra.items():
        how, _, path = name.partition(":")
        if path not in places:
            raise ValueError(f"write_state: the model's cache has no {path!r} to restore")
        if how == _COUNT:
            _assign(filled, path, type(places[path])(tensor[0].item()))
            continue
        value = tensor.movedim(0, 1) if how == _SECOND else tensor
        _assign(filled, path, (value[0] if how == _SHARED else value).clone())
    return filled


def tensors_in(source: Any) -> list[Tensor]:
    """Every tensor inside an object that has an axis and is not empty."""
    return [t for _, t in _leaves(source) if isinstance(t, Tensor) and t.dim() and t.numel()]


def _batch_first(value: Any, seen: Tensor) -> tuple[str, Tensor]:
    B = seen.shape[0]
    if not isinstance(value, Tensor):
        return _COUNT, torch.full((B,), value, dtype=torch.int64, device=seen.device)
    if value.dim() and value.shape[0] == B:
        return _ROWS, value.clone().contiguous()
    if value.dim() > 1 and value.shape[1] == B:
        return _SECOND, value.movedim(1, 0).clone().contiguous()
    return _SHARED, value.unsqueeze(0).repeat(B, *[1] * value.dim())


def _leaves(source: Any, prefix: str = "", inside: frozenset[int] = frozenset()) -> Any:
    """Yield (path, tensor or count) in a fixed order."""
    if id(source) in inside or isinstance(source, _SKIPPED):
        return
    if isinstance(source, (Tensor, bool, int)):
        yield prefix, source
        return
    for name, value in _members(source):
        yield from _leaves(value, f"{prefix}.{name}" if prefix else name, inside | {id(source)})


def _members(source: Any) -> list[tuple[str, Any]]:
    if isinstance(source, dict):
        return [(str(key), value) for key, value in source.items()]
    if isinstance(source, (list, tuple)):
        return [(str(i), value) for i, value in enumerate(source)]
    known = getattr(source, "__dict__", {})
    # A config hangs on some caches; it is the model's, not what was read.
    return [(name, value) for name, value in known.items() if not name.endswith("config")]


def _assign(target: Any, path: str, value: Any) -> None:
    """Set what lies at `path`, rebuilding tuples on the way."""
    head, _, rest = path.partition(".")
    get, put = _access(target, head)
    if rest:
        inner = get()
        if isinstance(inner, tuple):
            changed = list(inner)
            _assign(changed, rest, value)
            put(tuple(changed))
            return
        _assign(inner, rest, value)
        return
    put(value)


def _access(target: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    if isinstance(target, dict):
        key = next(key for key in target if str(key) == name)
        return lambda: target[key], lambda value: target.__setitem__(key, value)
    if isinstance(target, list):
        index = int(name)
        return lambda: target[index], lambda value: target.__setitem__(index, value)
    return lambda: getattr(target, name), lambda value: setattr(target, name, value)
