"""What a causal model carries from one token to the next: one type, batch axis first.

A `State` is a frozen dataclass of tensors, registered as a pytree, so `torch.compile`, DDP,
activation checkpointing and `tree_map` see through it. Nothing ever writes into one: every
operation returns a new State, so keeping a State keeps the past, and forking is assignment.

Axes legend: B batch, T tokens, N slots, D channels, H heads, K key dim, V value dim, W conv width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar, dataclass_transform

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Axes = tuple[str, ...]
Kind = TypeVar("Kind", bound="State")


def axes(names: str) -> Any:
    """Declare a tensor field of a State and the names of its axes, e.g. `axes("batch channel")`."""
    return field(metadata={"axes": tuple(names.split())})


@dataclass(frozen=True, eq=False, kw_only=True)
class State:
    """Base of all states. Two States are never `==`; compare their tensors through `items()`.

    Fields: `seen` (B,) int64, the unmasked tokens each row has consumed since its last reset;
    `extra`, further named tensors (conv taps, an LSTM's cell, a policy's scores), whose axes
    stand in `extra_axes`. Only tensors with an axis of that name take part in `resize`.

    >>> _, state = MinGRU(4)(torch.randn(2, 5, 4))
    >>> state.rows(0)
    VectorState(seen (1,), h (1, 4); 24 bytes)
    >>> dict(state.resize(channel=6).items())["h"].shape
    torch.Size([2, 6])
    """

    seen: Tensor = axes("batch")
    extra: dict[str, Tensor] = field(default_factory=dict)
    extra_axes: dict[str, Axes] = field(default_factory=dict)

    def named(self) -> Iterator[tuple[str, Tensor, Axes]]:
        """Yield (name, tensor, axis names) for every tensor, the extra ones included."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                yield f.name, value, f.metadata["axes"]
            elif f.name == "extra":
                for name in sorted(value):
                    yield f"extra.{name}", value[name], self.extra_axes[name]
            elif isinstance(value, tuple):
                yield from _named_in(value, f.name)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor), names such as `layers.0.h` or `layers.1.extra.taps`."""
        for name, tensor, _ in self.named():
            yield name, tensor

    @property
    def nbytes(self) -> int:
        """Bytes held, measured from the tensors (`seen` and `extra` included)."""
        return sum(t.numel() * t.element_size() for _, t in self.items())

    @property
    def numel(self) -> int:
        """Number of elements held, `seen` and `extra` included."""
        return sum(t.numel() for _, t in self.items())

    @property
    def batch_size(self) -> int:
        return self.seen.shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply `fn` to every tensor; the structure and the axis names stay."""
        return pytree.tree_map_only(Tensor, fn, self)

    def detach(self) -> Self:
        """The same values, cut from the autograd graph exactly here (law 3)."""
        return self.map(lambda t: t.detach())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`; a dtype converts floating-point tensors only (never `seen` or `pos`)."""
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def convert(t: Tensor) -> Tensor:
            kind = dtype if t.is_floating_point() else None
            return t.to(device, kind, non_blocking, copy=copy)

        return self.map(convert)

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """The given rows of the batch, in that order, as fresh tensors (the batch axis stays).

        `index` may be an int (one row), a slice, a list, an int64 tensor or a (B,) bool tensor.
        Raises ValueError for an index outside the batch.
        """
        chosen = torch.arange(self.batch_size)
        try:
            chosen = chosen[[index] if isinstance(index, int) else _on_cpu(index)]
        except IndexError as error:
            raise ValueError(
                f"rows: index {index} is outside a batch of {self.batch_size}"
            ) from error
        return self.map(lambda t: t.index_select(0, chosen.to(t.device)))

    def where(self, condition: Tensor, other: Self) -> Self:
        """Row by row: this state where `condition` (B,) bool holds, `other` elsewhere."""

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)

        return pytree.tree_map(pick, self, other)

    def resize(self, **sizes: int) -> Self:
        """Grow (with zeros) or cut the named axes, e.g. `resize(key=128)`, in every tensor.

        Growing and cutting back is the identity. The batch axis is changed by `rows` and `cat`.
        Raises ValueError for an axis that no tensor has.
        """
        known = {name for _, _, names in self.named() for name in names} - {"batch"}
        for name, size in sizes.items():
            if name not in known:
                raise ValueError(f"resize: no axis {name!r}, this state has {sorted(known)}")
            if size < 0:
                raise ValueError(f"resize: {name}={size}, expected a size >= 0")
        sized = iter([_resized(t, names, sizes) for _, t, names in self.named()])
        leaves, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([next(sized) for _ in leaves], spec)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same structure with other tensors, by the names that `items` gives.

        Raises ValueError if a name is missing or unknown, or a shape or dtype differs.
        """
        have = dict(self.items())
        if have.keys() != tensors.keys():
            odd = sorted(have.keys() ^ tensors.keys())
            raise ValueError(f"with_tensors: names differ: {', '.join(odd)}")
        for name, old in have.items():
            new = tensors[name]
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                raise ValueError(
                    f"with_tensors: {name} is {tuple(new.shape)} {new.dtype}, "
                    f"expected {tuple(old.shape)} {old.dtype}"
                )
        _, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([tensors[name] for name in have], spec)

    def with_extra(self, name: str, tensor: Tensor, names: str) -> Self:
        """A copy that also holds `tensor` as `extra[name]`, its axes named by `names`."""
        return replace(
            self,
            extra={**self.extra, name: tensor},
            extra_axes={**self.extra_axes, name: tuple(names.split())},
        )

    def without_extra(self, name: str) -> Self:
        """A copy without `extra[name]`."""
        return replace(
            self,
            extra={k: v for k, v in self.extra.items() if k != name},
            extra_axes={k: v for k, v in self.extra_axes.items() if k != name},
        )

    def __repr__(self) -> str:
        inside = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.items())
        return f"{type(self).__name__}({inside}; {self.nbytes:,} bytes)"


def cat(states: Sequence[State]) -> State:
    """Join states of equal structure along the batch axis.

    >>> state = MinGRU(4).init_state(3)
    >>> cat([state.rows(2), state.rows([0, 1])]).batch_size
    3
    """
    if not states:
        raise ValueError("cat: no states given")
    specs = [pytree.tree_flatten(s)[1] for s in states]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"cat: states of different structure: {', '.join(map(repr, states))}")
    shapes = [[t.shape[1:] for _, t in s.items()] for s in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"cat: states of different sizes: {', '.join(map(repr, states))}")
    return pytree.tree_map(lambda *tensors: torch.cat(tensors), *states)


def _named_in(value: tuple, prefix: str) -> Iterator[tuple[str, Tensor, Axes]]:
    for i, inner in enumerate(value):
        if isinstance(inner, tuple):
            yield from _named_in(inner, f"{prefix}.{i}")
        else:
            for name, tensor, names in inner.named():
                yield f"{prefix}.{i}.{name}", tensor, names


def _on_cpu(index: Any) -> Any:
    return index.cpu() if isinstance(index, Tensor) else index


def _resized(tensor: Tensor, names: Axes, sizes: dict[str, int]) -> Tensor:
    for axis, name in enumerate(names):
        if name not in sizes or name == "batch":
            continue
        have, want = tensor.shape[axis], sizes[name]
        if want <= have:
            tensor = tensor.narrow(axis, 0, want).clone()
        else:
            grown = list(tensor.shape)
            grown[axis] = want - have
            tensor = torch.cat([tensor, tensor.new_zeros(grown)], axis)
    return tensor


@dataclass_transform(
    eq_default=False, kw_only_default=True, frozen_default=True, field_specifiers=(axes, field)
)
def state_type(cls: type[Kind]) -> type[Kind]:
    """Make a subclass of State: a frozen dataclass and a pytree node.

    Tensors are leaves; names and axes are static structure.
    """
    cls = dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
    names = tuple(f.name for f in fields(cls) if f.name != "extra_axes")

    def flatten(state: State) -> tuple[list, tuple]:
        # Sorted, so that the order in which extras were added is no part of the structure.
        extra = {name: state.extra[name] for name in sorted(state.extra)}
        values = [extra if n == "extra" else getattr(state, n) for n in names]
        return values, tuple(sorted(state.extra_axes.items()))

    def flatten_with_keys(state: State) -> tuple[list, tuple]:
        values, context = flatten(state)
        return [(pytree.GetAttrKey(n), v) for n, v in zip(names, values)], context

    def unflatten(values: Any, context: tuple) -> State:
        return cls(**dict(zip(names, values)), extra_axes=dict(context))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"statewright.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls


@state_type
class VectorState(State):
    """`h_t = a_t * h_{t-1} + b_t` or any vector recurrence: h (B, D), at least float32.

    >>> VectorState(h=torch.zeros(2, 4), seen=torch.zeros(2, dtype=torch.long))
    VectorState(seen (2,), h (2, 4); 48 bytes)
    """

    h: Tensor = axes("batch channel")


@state_type
class MatrixState(State):
    """`S_t = diag(a_t) S_{t-1} + k_t v_t^T`: S (B, H, K, V), at least float32.

    >>> MatrixState(S=torch.zeros(1, 2, 4, 8), seen=torch.zeros(1, dtype=torch.long))
    MatrixState(seen (1,), S (1, 2, 4, 8); 264 bytes)
    """

    S: Tensor = axes("batch head key value")


@state_type
class KVState(State):
    """Key/value rows of attention: k, v (B, H, N, Dh), pos (B, H, N) int64.

    Slots are unordered; `pos` says which token a slot holds, and -1 marks an empty slot.

    >>> rows, pos = torch.zeros(1, 2, 3, 4), torch.arange(3).expand(1, 2, 3)
    >>> KVState(k=rows, v=rows, pos=pos, seen=torch.tensor([3]))
    KVState(seen (1,), k (1, 2, 3, 4), v (1, 2, 3, 4), pos (1, 2, 3); 248 bytes)
    """

    k: Tensor = axes("batch head slot key")
    v: Tensor = axes("batch head slot value")
    pos: Tensor = axes("batch head slot")


@state_type
class OpaqueState(State):
    """What a foreign cache holds and we do not decode: named tensors in `extra`, each batch first.

    Sized, saved, forked and restored as a whole; `statewright.hf.bridge` writes it back.

    >>> state = OpaqueState(seen=torch.tensor([3]))
    >>> state.with_extra("taps", torch.zeros(1, 8), "batch width")
    OpaqueState(seen (1,), extra.taps (1, 8); 40 bytes)
    """


@state_type
class ModelState(State):
    """The states of all layers; a layer may hold a tuple of states (hybrid layers).

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> [type(layer).__name__ for layer in model.init_state(1).layers]
    ['VectorState', 'VectorState']
    """

    layers: tuple[Any, ...] = field(default=())
