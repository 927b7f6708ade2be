"""Resize: a larger or smaller state for some layers of a trained model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from statewright import spec
from statewright.mixers import GLA, MIXERS, Mixer, build_mixer
from statewright.models.config import StatewrightConfig
from statewright.models.lm import StatewrightForCausalLM

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Plan:
    """What a resize will do, known from the config alone.

    state_bytes: of one sequence, before and after; parameters: likewise; layers: those touched.
    """

    before: StatewrightConfig
    after: StatewrightConfig
    factor: Fraction
    layers: tuple[int, ...]
    init: str
    part: str
    state_bytes: tuple[int, int]
    parameters: tuple[int, int]

    @property
    def shrinks(self) -> bool:
        return self.factor < 1


def plan_resize(
    config: StatewrightConfig,
    key: str | float | Fraction = 4.0,
    layers: str | Sequence[int] = "every:6",
    init: str = "zero",
    heads: str | float | None = None,
) -> Plan:
    """Which layers change to what, and what it costs; nothing is loaded (meta device).

    key: the factor of the key dimension ("4x", 4.0, "0.5x"; channels for minGRU and minLSTM),
    or "all", GLA's heads merged into one. heads, instead: the share of GLA's heads to keep
    ("0.5x"). layers: "all", "every:6" (0, 6, 12, ...), "first:4", "last:4", or numbers. init: how
    what is new starts; the mixer's `inherit` says which it has. Raises ValueError, naming what is
    possible, for anything that cannot be done.
    """
    part = "key" if heads is None else "heads"
    asked = key if heads is None else heads
    chosen = choose_layers(layers, config.num_hidden_layers)
    specs = [config.mixer_of(i) for i in range(config.num_hidden_layers)]
    factors = set()
    for i in chosen:
        mixer = _resizable(specs[i], config.hidden_size, i)
        factors.add(factor := _factor(asked, part, mixer))
        try:
            specs[i] = _with_options(specs[i], _changed(mixer, factor, init, part))
            build_mixer_on_meta(specs[i], config.hidden_size)
        except ValueError as error:
            raise ValueError(f"resize: layer {i}: {error}") from error
    if len(factors) > 1:
        raise ValueError(
            f"resize: {part}={asked!r} means different factors in layers {list(chosen)}"
        )
    if len(set(specs)) > 1:
        specs = [_with_options(text, {}) for text in specs]
    values = {**config.to_dict(), "mixer": specs[0] if len(set(specs)) == 1 else specs}
    after = StatewrightConfig.from_dict(values)
    sizes = [_sizes(c) for c in (config, after)]
    bytes_, parameters = zip(*sizes)
    return Plan(config, after, factors.pop(), chosen, init, part, bytes_, parameters)


@torch.no_grad()
def resize(
    model: StatewrightForCausalLM,
    key: str | float = 4.0,
    layers: str | Sequence[int] = "every:6",
    init: str = "zero",
    seed: int = 0,
    calibration: Tensor | None = None,
    heads: str | float | None = None,
) -> StatewrightForCausalLM:
    """A new model whose chosen layers have a larger or smaller state; `model` is left alone.

    Arguments as `plan_resize`. Growing: what is new is drawn from (seed, layer); `zero` preserves
    the function and learns. Shrinking (a factor below 1) keeps the keys or heads with most energy
    on `calibration`, token ids (B, T). Every other tensor is bit-identical. Raises ValueError as
    `plan_resize`, and if a shrink has no calibration.

    >>> model = StatewrightForCausalLM(StatewrightConfig(hidden_size=8, num_hidden_layers=2))
    >>> large = resize(model, key=2, layers="all")
    >>> [m.init_state(1).layers[0].h.shape for m in (model, large)]
    [torch.Size([1, 8]), torch.Size([1, 16])]
    """
    plan = plan_resize(model.config, key, layers, init, heads)
    kept: dict[int, Tensor] = {}
    if plan.shrinks:
        if calibration is None:
            raise ValueError("resize: a factor below 1 needs calibration, token ids (B, T)")
        kept = kept_keys(model, plan, calibration)
    new = meta_model(plan.after)
    new.config.policy = plan.after.policy
    new = new.to(model.dtype).to_empty(device=model.device)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        match = _LAYER.match(name)
        groups.setdefault(match.group() if match else "", {})[name] = tensor
    for prefix, group in groups.items():
        layer = int(prefix.split(".")[2]) if prefix else -1
        new.load_state_dict(resized_group(plan, layer, group, seed, kept.get(layer)), strict=False)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.train(model.training)


def resized_group(
    plan: Plan, layer: int, tensors: dict[str, Tensor], seed: int, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """One layer's tensors by their names in the model, after the change; layer -1: no layer."""
    if layer not in plan.layers:
        return tensors
    prefix = f"model.layers.{layer}."
    own = {n.removeprefix(f"{prefix}mixer."): t for n, t in tensors.items() if "mixer." in n}
    D = plan.before.hidden_size
    old = build_mixer_on_meta(plan.before.mixer_of(layer), D)
    old.load_state_dict(own, assign=True)
    some = next(iter(own.values()))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed * 1_000_003 + layer)
        new = build_mixer(plan.after.mixer_of(layer), D).to(some.dtype)
    old = old.to("cpu")
    if kept is None:
        new.inherit(old, plan.init)
    else:
        new.keep(old, kept, plan.part)
    found = {n: t for n, t in tensors.items() if "mixer." not in n}
    found |= {f"{prefix}mixer.{n}": t.to(some.device) for n, t in new.state_dict().items()}
    if kept is None and plan.init in new.RESETS_NORM:
        norm = f"{prefix}norm."
        found[f"{norm}weight"] = torch.ones_like(found[f"{norm}weight"])
        if f"{norm}bias" in found:
            found[f"{norm}bias"] = torch.zeros_like(found[f"{norm}bias"])
    return found


def kept_keys(model: StatewrightForCausalLM, plan: Plan, calibration: Tensor) -> dict[int, Tensor]:
    """Of each layer the keys with most energy on token ids (B, T): (groups, fewer), ascending."""
    inputs: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        return lambda module, args, output: inputs.__setitem__(layer, args[0].detach())

    blocks = model.model.layers
    hooks = [blocks[i].mixer.register_forward_hook(note(i)) for i in plan.layers]
    try:
        with torch.no_grad():
            model(calibration)
    finally:
        for hook in hooks:
            hook.remove()
    kept = {}
    for i in plan.layers:
        energy = blocks[i].mixer.energy(inputs[i], plan.part)
        count = int(energy.shape[1] * plan.factor)
        kept[i] = energy.topk(count, 1).indices.sort(1).values.cpu()
    return kept


def choose_layers(rule: str | Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers a rule means for `count` layers, ascending; ValueError if it means none."""
    texts = rule.split(",") if isinstance(rule, str) else [str(i) for i in rule]
    kind, _, number = texts[0].strip().partition(":")
    expected = "expected all, every:N, first:N, last:N or numbers such as 0,6,12"
    try:
        if len(texts) == 1 and kind == "all" and not number:
            return tuple(range(count))
        if len(texts) == 1 and number:
            n = int(number)
            named = {"every": range(0, count, n or 1), "first": range(n), "last": range(-n, 0)}
            chosen = [i if kind != "last" else count + i for i in named[kind]]
            if n < 1:
                raise ValueError(number)
        else:
            chosen = sorted({int(text) for text in texts})
    except (KeyError, ValueError) as error:
        raise ValueError(f"layers={rule!r}: {expected}") from error
    outside = [i for i in chosen if not 0 <= i < count]
    if outside or not chosen:
        raise ValueError(
            f"layers={rule!r}: {outside[:3] or 'none'} out of range, the model has {count} layers, "
            f"0 to {count - 1}"
        )
    return tuple(chosen)


def build_mixer_on_meta(text: str, hidden_size: int) -> Mixer:
    with torch.device("meta"):
        return build_mixer(text, hidden_size)


def _changed(mixer: Any, factor: Fraction, init: str, part: str) -> dict[str, Any]:
    """The options of a layer's mixer that change."""
    if factor < 1:
        return mixer.shrunk(factor, part)
    if init not in mixer.GROWTHS:
        raise ValueError(
            f"init={init!r} is unknown for {type(mixer).__name__}, "
            f"expected one of {', '.join(mixer.GROWTHS)}"
        )
    return mixer.grown(factor, init)


def _factor(key: str | float | Fraction, part: str, mixer: Any) -> Fraction:
    wanted = f"{part}={key!r}: expected a factor such as 4x or 0.5x"
    if part not in mixer.SHRINKS:
        raise ValueError(f"resize: {part} can be left out of GLA only; use key")
    if key == "all" and part == "key":
        if not isinstance(mixer, GLA) or mixer.num_heads == 1:
            raise ValueError(f"{wanted}; 'all' merges the heads of a GLA with several")
        return Fraction(mixer.num_heads)
    try:
        factor = Fraction(str(key).strip().removesuffix("x"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{wanted}, or all") from error
    if factor <= 0 or factor == 1:
        raise ValueError(f"{wanted}, positive and not 1")
    if part == "heads" and factor > 1:
        raise ValueError(f"{wanted}, below 1: heads can be left out; key merges them")
    return factor


def _resizable(text: str, hidden_size: int, layer: int) -> Any:
    mixer = build_mixer_on_meta(text, hidden_size)
    if not hasattr(mixer, "GROWTHS"):
        known = ", ".join(name for name, cls in MIXERS.items() if hasattr(cls, "GROWTHS"))
        raise ValueError(
            f"resize: layer {layer} is {text!r}, which has no construction (known: {known}); "
            "choose other layers"
        )
    return mixer


def _with_options(text: str, changed: dict[str, Any]) -> str:
    name, given = spec.split(text)
    options = spec.typed(given, MIXERS[name], f"mixer {name!r}") | changed
    return spec.format_spec(name, options, MIXERS[name])


def meta_model(config: StatewrightConfig) -> StatewrightForCausalLM:
    """The model without weights, and without its default policy, which would be announced again."""
    with torch.device("meta"):
        return StatewrightForCausalLM(
            StatewrightConfig.from_dict({**config.to_dict(), "policy": None})
        )


def _sizes(config: StatewrightConfig) -> tuple[int, int]:
    """Bytes of one sequence's state before it has read anything, and parameters."""
    dtype = getattr(config, "dtype", None) or torch.float32
    model = meta_model(config).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model.init_state(1).nbytes, model.num_parameters()
