"""A transformers model behind the interface of ours: (ids, state) -> logits, state.

Positions are always passed explicitly. Whether the model continues correctly is not believed but
tried, once, on random ids: where it does not, it is fed token by token (or row by row), which is
announced with the reason; where its state cannot be passed at all, it is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from statewright.hf.arguments import NAMES, by_name, cache_argument
from statewright.hf.bounded import BoundedCache
from statewright.hf.bridge import has_own_cache, read_state, write_state
from statewright.policies import Eviction, Policy, build_policy, policy_spec
from statewright.precision import device_of, dtype_of
from statewright.state import KVState, ModelState, OpaqueState, State, cat

# Error allowed, as a share of the error when the state is ignored; looser where rounding is coarse.
WRONG = 1e-3
_WRONG_HALF = 5e-2
_HOPELESS = 5e-2
# Continue from zero on several tokens (transformers 5.23), by a share that half precision hides.
_RESTARTS = {"mamba", "falcon_mamba", "jamba", "zamba", "minimax"}


@dataclass(frozen=True, eq=False)
class HostOutput:
    """logits (B, T, vocabulary) and the state after them."""

    logits: Tensor
    state: ModelState


@dataclass(frozen=True)
class Feeding:
    """How a model must be fed to continue correctly, and why."""

    by_token: bool = False
    by_row: bool = False
    reasons: tuple[str, ...] = ()


class RawModel:
    """Calls a transformers causal LM with a cache, hiding only what the arguments are called."""

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model, self.config = model, model.config
        self.text_config = model.config.get_text_config(decoder=True)
        self.name = type(model).__name__
        # RWKV calls it its state.
        self.argument = cache_argument(model) or ("state" if "state" in parameters else None)
        self.takes = {"position_ids", "logits_to_keep", "attention_mask"} & set(parameters)
        if self.argument is None:
            raise ValueError(
                f"{self.name} takes no cache (none of {', '.join(NAMES)}, state): "
                "it has no state that could be carried"
            )

    def __call__(
        self,
        ids: Tensor | None,
        cache: Any = None,
        start: int | Tensor = 0,
        positions: Tensor | bool = True,
        keep: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """ids (B, T) after `cache`, which has seen `start` tokens -> logits, the cache.

        positions: True counts from `start`, a (B, T) tensor is passed as it is, False is none.
        The cache is the host's own and may be changed in place.
        """
        if cache is not None:
            kwargs[self.argument] = cache
        if ids is not None:
            kwargs["input_ids"] = ids
        given = ids if ids is not None else kwargs["inputs_embeds"]
        if positions is True and "position_ids" in self.takes:
            steps = torch.arange(given.shape[1], device=given.device)
            first = start[:, None] if isinstance(start, Tensor) else start
            positions = (first + steps).expand(given.shape[0], -1)
        if isinstance(positions, Tensor):
            kwargs["position_ids"] = positions
        if keep and "logits_to_keep" in self.takes:
            kwargs["logits_to_keep"] = keep
        out = self.model(use_cache=True, **by_name(self.model), **kwargs)
        logits = out.logits[:, -keep:] if keep else out.logits
        return logits, getattr(out, self.argument, None)

    def random_ids(self, batch_size: int, length: int, seed: int = 0) -> Tensor:
        """Ids (B, T) that are not special tokens as far as the vocabulary allows."""
        size = self.text_config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(min(3, size - 1), size, (batch_size, length), generator=generator)
        return ids.to(device_of(self.model))


class ForeignModel:
    """A transformers causal LM as a Session and `state_file` see our own models.

    `model(ids, state)` returns `.logits` and `.state`; the state given is never written to.
    Raises ValueError for a model without a cache, or whose state cannot be passed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.raw = RawModel(model)
        self.model, self.config = model, model.config
        self._bounded: dict[Policy, BoundedCache] = {}

    def eval(self) -> Self:
        self.model.eval()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def init_state(self, batch_size: int) -> ModelState:
        """Nothing read yet: no layers, since the model makes them when it reads."""
        device = device_of(self.model)
        return ModelState(seen=torch.zeros(batch_size, dtype=torch.int64, device=device))

    def checked(self, policy: Policy | str | None) -> Eviction | None:
        """The policy to give to a call; ValueError for one that this model cannot be under."""
        chosen = build_policy(policy)
        if chosen is not None:
            self._empty(chosen)
        return chosen

    def __call__(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        logits_to_keep: int = 0,
        policy: Policy | str | None = None,
    ) -> HostOutput:
        """ids (B, T) -> logits of the last `logits_to_keep` tokens (0: all), and the new state.

        policy: an Eviction that bounds the attention layers' lists, exactly as token by token
        (see `BoundedCache`); a state once bounded must go on under a policy.
        """
        state = self.init_state(ids.shape[0]) if state is None else state
        policy = build_policy(policy)
        if not state.layers:
            self.feeding  # noqa: B018  a model that cannot be continued is refused at once
            return self._call(ids, state, policy, logits_to_keep)
        if self.feeding.by_row and ids.shape[0] > 1:
            each = [(ids[i : i + 1], state.rows(i)) for i in range(ids.shape[0])]
            rows = [self._pieces(row, alone, policy) for row, alone in each]
            logits = torch.cat([out.logits for out in rows])
            out = HostOutput(logits, cat([out.state for out in rows]))
        else:
            out = self._pieces(ids, state, policy)
        return HostOutput(out.logits[:, -logits_to_keep:], out.state)

    def _pieces(self, ids: Tensor, state: ModelState, policy: Policy | None) -> HostOutput:
        size = 1 if self.feeding.by_token else max(ids.shape[1], 1)
        outputs = []
        for piece in ids.split(size, dim=1):
            out = self._call(piece, state, policy)
            outputs.append(out.logits)
            state = out.state
        return HostOutput(torch.cat(outputs, 1), state)

    def _call(
        self, ids: Tensor, state: ModelState, policy: Policy | None, keep: int = 0
    ) -> HostOutput:
        kind = self._kind(state) if policy is None else self._empty(policy)
        cache = write_state(state, self.model, kind)
        logits, cache = self.raw(ids, cache, state.seen, keep=keep)
        return HostOutput(logits, read_state(cache, self.config, state.seen + ids.shape[1]))

    def _kind(self, state: ModelState) -> Any:
        if not self._is_opaque:
            return None
        return self._read_one(state.batch_size)

    def _empty(self, policy: Policy) -> BoundedCache:
        """An unused BoundedCache, made once: what it looks for in the model takes milliseconds."""
        if policy not in self._bounded:
            self._bounded[policy] = self._bounded_by(policy)
        return self._bounded[policy]

    def _bounded_by(self, policy: Policy) -> BoundedCache:
        label = f"policy {policy_spec(policy)}"
        if not isinstance(policy, Eviction):
            raise ValueError(
                f"{label}: {self.raw.name} is a transformers model, and only policies that evict "
                "can act on its state; convert the model first: statewright convert"
            )
        if self._is_opaque or has_own_cache(self.model):
            raise ValueError(
                f"{label}: {self.raw.name} has no lists of keys and values that we can bound"
            )
        if KVState not in self._kinds:
            raise ValueError(
                f"{label}: {policy.label} bounds lists of keys and values, but {self.raw.name} "
                "has none: its state does not grow"
            )
        return BoundedCache(self.model, policy)

    @torch.no_grad()
    def _read_one(self, batch_size: int) -> Any:
        return self.raw(self.raw.random_ids(batch_size, 1))[1]

    @cached_property
    def _kinds(self) -> list[type[State]]:
        """What this model's state is made of."""
        layers = read_state(self._read_one(1), self.config, 1).layers
        return [type(part) for la in layers for part in (la if isinstance(la, tuple) else (la,))]

    @property
    def _is_opaque(self) -> bool:
        """Whether this model's cache is not decoded, so that its structure must be made anew."""
        return self._kinds == [OpaqueState]

    @cached_property
    def feeding(self) -> Feeding:
        """How this model must be fed, found by trying; announced if it costs speed."""
        training = self.model.training
        self.model.eval()
        try:
            found = _try(self.raw)
        finally:
            self.model.train(training)
        for reason in found.reasons:
            warnings.warn(reason, stacklevel=3)
        return found


def as_host(model: Any) -> Any:
    """Our models and hosts as they are; any other causal LM as a ForeignModel."""
    return model if hasattr(model, "init_state") else ForeignModel(model)


@torch.no_grad()
def _try(raw: RawModel) -> Feeding:
    """Two chunks and single tokens against one call, with two rows and with one."""
    ids = raw.random_ids(2, 24, seed=7)
    cut, kind = 12, raw.text_config.model_type
    whole, cache = raw(ids)
    if cache is None:
        raise ValueError(
            f"{raw.name} returns no cache: its state lies on its modules and cannot be passed, "
            "saved or forked; only generate() works"
        )
    # Many models return float32 logits whatever they compute in.
    dtype = dtype_of(raw.model)
    limit = WRONG if dtype in (torch.float32, torch.float64) else _WRONG_HALF
    ignored = _gap(raw(ids[:, cut:], None, cut)[0], whole[:, cut:])

    def wrong(rows: int, size: int) -> float:
        """The error of pieces of `size` tokens, as a share of that of no state at all."""
        try:
            _, cache = raw(ids[:rows, :cut])
            outputs, at = [], cut
            for piece in ids[:rows, cut:].split(size, dim=1):
                logits, cache = raw(piece, cache, at)
                outputs.append(logits)
                at += piece.shape[1]
        except (RuntimeError, IndexError, TypeError, AttributeError):
            return float("inf")
        return _gap(torch.cat(outputs, 1), whole[:rows, cut:]) / max(ignored, 1e-30)

    reasons, by_row = [], False
    steps, chunk = wrong(2, 1), wrong(2, 6)
    if steps > limit and wrong(1, 1) < min(limit, steps):
        by_row, steps = True, wrong(1, 1)
        reasons.append(
            f"{raw.name} (transformers) continues a batch wrongly one token at a time; "
            "its rows are fed one by one"
        )
    restarts = chunk > limit or (limit > WRONG and kind in _RESTARTS)
    by_token = restarts and steps < chunk
    if by_token:
        reasons.append(
            f"{raw.name} (transformers) does not continue from its state when given several "
            f"tokens (off by {chunk:.2g} of ignoring the state); it is fed token by token, slower"
        )
    left = max(steps, 0.0 if by_token else chunk)
    if left > max(_HOPELESS, limit):
        raise ValueError(
            f"{raw.name}: continuing from its state is off by {left:.2g} of ignoring the state, "
            "however it is fed; it cannot be carried"
        )
    if left > limit:
        reasons.append(
            f"{raw.name} (transformers) computes single tokens differently from several: "
            f"continuing is off by {left:.2g} of ignoring the state"
        )
    return Feeding(by_token, by_row, tuple(reasons))


def _gap(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    gap = (got.double() - want.double()).abs().max().item()
    return float("inf") if gap != gap else gap
