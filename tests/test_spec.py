"""Specification strings: typed options, and errors that say what is known."""

from __future__ import annotations

from typing import Literal

import pytest

from statewright import spec
from statewright.mixers import MIXERS, MinLSTM, build_mixer


def entry(
    width: int,
    *,
    budget: int = 1,
    rate: float = 0.5,
    fast: bool = False,
    form: Literal["log", "vanilla"] = "log",
    level: Literal[1, 2] = 1,
    limit: int | None = None,
    period: int | Literal["never"] = 1,
    scale: float | None = 1.0,
    label: str = "x",
) -> dict:
    return dict(locals())


REGISTRY = {"entry": entry, "window": dict}


def built(options: str) -> dict:
    return spec.build(f"entry:{options}", REGISTRY, "policy", 7)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("budget=64", "budget", 64),
        ("budget=64k", "budget", 65_536),
        ("budget=2M", "budget", 2 * 1024**2),
        ("budget=1_000", "budget", 1000),
        ("budget=-3", "budget", -3),
        ("rate=1e-3", "rate", 1e-3),
        ("rate=2", "rate", 2.0),
        ("fast=true", "fast", True),
        ("fast=No", "fast", False),
        ("form=vanilla", "form", "vanilla"),
        ("level=2", "level", 2),
        ("limit=none", "limit", None),
        ("limit=4k", "limit", 4096),
        ("period=never", "period", "never"),
        ("period=3", "period", 3),
        ("scale=none", "scale", None),
        ("scale=0.25", "scale", 0.25),
        ("label=a b", "label", "a b"),
        ("label=a=b", "label", "a=b"),
    ],
)
def test_options_have_types(options: str, name: str, value) -> None:
    got = built(options)
    assert got[name] == value and type(got[name]) is type(value)
    assert got["width"] == 7


def test_name_alone_keeps_the_defaults() -> None:
    assert spec.build("entry", REGISTRY, "policy", 7) == entry(7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entri", r"unknown policy 'entri'; did you mean 'entry'\? \(known: entry, window\)"),
        ("zzz", r"unknown policy 'zzz' \(known"),
        ("", "unknown policy ''"),
        ("entry:bugdet=3", "policy 'entry' has no option 'bugdet'; did you mean 'budget'"),
        ("entry:width=3", "no option 'width'"),
        ("entry:budget", "expected name:key=value, got 'budget'"),
        ("entry:", "expected name:key=value, got ''"),
        ("entry:budget=", "expected name:key=value"),
        ("entry:=3", "expected name:key=value"),
        ("entry:budget=3:budget=4", "'budget' is given twice"),
        ("entry:budget=many", "policy 'entry': budget='many', expected an integer"),
        ("entry:budget=1.5", "expected an integer"),
        ("entry:budget=k", "expected an integer"),
        ("entry:budget=none", "expected an integer"),
        ("entry:rate=fast", "expected a number"),
        ("entry:fast=maybe", "expected true or false"),
        ("entry:form=Log", "form='Log', expected 'log' or 'vanilla'"),
        ("entry:level=3", "expected 1 or 2"),
        ("entry:limit=x", "limit='x', expected an integer$"),
        ("entry:period=x", "expected an integer or 'never'"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.build(text, REGISTRY, "policy", 7)


def test_mixers_are_built_from_strings() -> None:
    mixer = build_mixer("minlstm:expansion=1.5:form=vanilla:normalize=no:forget_bias=1", 8)
    assert isinstance(mixer, MinLSTM) and mixer.inner_size == 12 and mixer.forget_bias == 1.0
    assert mixer.form == "vanilla" and not mixer.normalize
    with pytest.raises(ValueError, match="unknown mixer 'mingrue'; did you mean 'mingru'"):
        build_mixer("mingrue", 8)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("expansion", ["0", "-1", "0.01", "nan", "inf"])
def test_an_impossible_size_is_the_callers_mistake(name: str, expansion: str) -> None:
    with pytest.raises(ValueError, match="expansion"):
        build_mixer(f"{name}:expansion={expansion}", 8)
