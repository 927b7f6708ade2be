"""How a transformers model rotates its queries and keys, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from statewright.hf.arguments import cache_argument
from statewright.mixers.rope import Turn
from statewright.policies.simulate import Rule
from statewright.precision import device_of

# Far enough apart that two bases, scalings or layouts never look alike.
_POSITIONS = (0, 1, 2, 5, 11, 23, 47, 95)
_REFUSED = ("dynamic", "longrope")


@dataclass(frozen=True)
class Source:
    """One way in which a model asks a rotary module for cos and sin."""

    module: nn.Module
    options: tuple[tuple[str, Any], ...]

    def __call__(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """places (B, H, N) -> cos and sin (B, H, N, m), as the model's own."""
        like = torch.empty(0, dtype=dtype, device=places.device)
        # Not through __call__, whose hook undoes the rotation inside a model's call.
        cos, sin = self.module.forward(like, places.reshape(1, -1), **dict(self.options))
        return cos.view(*places.shape, -1).to(dtype), sin.view(*places.shape, -1).to(dtype)


@dataclass
class Probe:
    """What one pass of `find_turns` notes: the calls of rotary modules, each layer's q and k."""

    sources: list[Source] = field(default_factory=list)
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def rotary_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
            yield module


def undone(output: Any) -> Any:
    """A rotary module's output for which the model's rotation is the identity, to the last bit."""
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def note(probe: Probe, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Record a rotary module's call, if it gives a (cos, sin) for (x, position_ids, ...)."""
    if not (isinstance(output, tuple) and len(output) == 2 and _real(output[0])):
        return
    named = {"x": None, "position_ids": None} | dict(zip(("x", "position_ids", "layer_type"), args))
    options = {k: v for k, v in (named | kwargs).items() if k not in ("x", "position_ids")}
    probe.sources.append(Source(module, tuple(options.items())))


def find_turns(
    model: PreTrainedModel, make: Callable[[], Any]
) -> tuple[list[Turn | None], frozenset[int]]:
    """Each attention layer's rotation (None: it has none), and the modules to undo, by id.

    Eight tokens are read twice, with the model's rotation and with cos = 1, sin = 0; the rotation
    that turns the second pass's q and k into the first's is a layer's own. That finds partial and
    interleaved rotation, several bases, scalings and layers without positions, whatever the code.
    make() is a fresh unbounded BoundedCache. Raises ValueError with the reason if none fits.
    """
    name = type(model).__name__
    kinds = {str(kind) for module in rotary_modules(model) for kind in _kinds(module)}
    if not kinds:
        raise ValueError(
            f"BoundedCache: {name} has no rotary positions (learned ones are part of the hidden "
            "states, biases are part of its attention), so they cannot be renumbered; use "
            "positions='original'"
        )
    if bad := sorted(kinds.intersection(_REFUSED)):
        raise ValueError(
            f"BoundedCache: {name} has {bad[0]!r} rotary scaling, whose frequencies change with "
            "the length of the text; use positions='original'"
        )
    if model.training:
        raise ValueError("BoundedCache: positions are tried out here; call model.eval() first")
    wanted, logits = _pass(model, make(), None, frozenset())
    undo = frozenset(id(source.module) for source in wanted.sources)
    plain, again = _pass(model, make(), wanted.seen, undo)
    loose = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 5e-2
    if not _near(again, logits, loose):
        raise ValueError(
            f"BoundedCache: {name} uses its rotary positions for more than queries and keys, so "
            "they cannot be renumbered; use positions='original'"
        )
    sources = list(dict.fromkeys(wanted.sources))
    pairs = zip(plain.seen, wanted.seen, strict=True)
    return [_turn_of(*pair, sources, name, loose) for pair in pairs], undo


@torch.no_grad()
def _pass(
    model: PreTrainedModel, cache: Any, replayed: list | None, undo: frozenset[int]
) -> tuple[Probe, Tensor]:
    """One reading; with `replayed`, attention goes on from those q and k."""
    probe = cache.probe = Probe()
    cache.undo = undo
    layers = [layer for layer in cache.layers if hasattr(layer, "attend")]
    order = iter([] if replayed is None else replayed)
    for layer in layers:
        layer.attend = _listener(layer, probe, None if replayed is None else order)
    device = device_of(model)
    ids = torch.arange(len(_POSITIONS), device=device).remainder(model.config.vocab_size)
    at = torch.tensor([_POSITIONS], device=device)
    given = {cache_argument(model): cache}
    out = model(ids.unsqueeze(0), position_ids=at, use_cache=True, **given)
    return probe, out.logits


def _listener(layer: Any, probe: Probe, replayed: Iterator | None) -> Callable[..., Tensor]:
    attend = type(layer).attend

    def listen(query: Tensor, value: Tensor, rule: Rule, mask: Tensor | None) -> Tensor:
        probe.seen.append((query, layer.new_keys))
        if replayed is not None:
            query, layer.new_keys = next(replayed)
        return attend(layer, query, value, rule, mask)

    return listen


def _turn_of(
    plain: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    sources: list[Source],
    name: str,
    loose: float,
) -> Turn | None:
    if all(_near(a, b, loose) for a, b in zip(plain, wanted)):
        return None
    places = torch.tensor(_POSITIONS, device=plain[0].device, dtype=torch.float64)
    for source, pick, interleaved, at_end in product(sources, _PICKS, (False, True), (False, True)):
        turn = Turn(_angles(source, pick), interleaved, at_end)
        if all(_fits(turn, a, b, places, loose) for a, b in zip(plain, wanted)):
            return turn
    raise ValueError(
        f"BoundedCache: {name} rotates its queries and keys in a way that is not known here; use "
        "positions='original'"
    )


# From what a rotary module gives to one number per pair of channels.
_PICKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[..., : t.shape[-1] // 2],
    lambda t: t[..., ::2],
    lambda t: t,
)


def _angles(source: Source, pick: Callable[[Tensor], Tensor]) -> Callable:
    def angles(places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = source(places, dtype)
        return pick(cos), pick(sin)

    return angles


def _fits(turn: Turn, plain: Tensor, wanted: Tensor, places: Tensor, loose: float) -> bool:
    places = places.expand(plain.shape[:-1])
    try:
        return _near(turn(plain, places), wanted, loose)
    except (RuntimeError, IndexError):
        # Another number of channels, or positions of several axes (vision models).
        return False


def _near(a: Tensor, b: Tensor, loose: float) -> bool:
    return bool((a.double() - b.double()).abs().max() <= loose * b.double().abs().max())


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kinds(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", "default")
    return list(kind.values()) if isinstance(kind, dict) else [kind]
