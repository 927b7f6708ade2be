"""Specification strings: `"mingru:expansion=2:form=vanilla"` <-> a name and typed options.

The same string builds any mixer, policy or task from the command line, from a config and in
results and legends. Which names exist is up to the registry that is passed in.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_SUFFIXES = {"k": 1024, "m": 1024**2}


def parse_int(text: str) -> int:
    """An integer; `k` and `m` mean 1,024 and 1,048,576 (`"64k"` is 65,536)."""
    lowered = text.strip().lower().replace("_", "")
    factor = _SUFFIXES.get(lowered[-1:], 1)
    return int(lowered[:-1] if factor > 1 else lowered) * factor


def split(spec: str) -> tuple[str, dict[str, str]]:
    """Split `"name:key=value:key=value"` into the name and its options, still strings.

    The name may be that of a class, "package.module:Class:key=value".
    """
    name, *parts = spec.split(":")
    if parts and "=" not in parts[0] and ("." in name or parts[0][:1].isupper()):
        name = f"{name}:{parts.pop(0)}"
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{spec!r}: expected name:key=value, got {part!r}")
        if key in options:
            raise ValueError(f"{spec!r}: option {key!r} is given twice")
        options[key] = value
    return name.strip(), options


def build(spec: str, registry: Mapping[str, Callable], kind: str, *args: Any) -> Any:
    """Call the registry's entry for `spec` with `args` and the spec's options.

    `kind` names the registry in errors ("mixer"). Raises ValueError for an unknown name or
    option, or a value that the option's annotation does not accept, saying what is known.
    """
    name, options = parse(spec, registry, kind)
    return registry[name](*args, **options)


def parse(spec: str, registry: Mapping[str, Callable], kind: str) -> tuple[str, dict[str, Any]]:
    """The name and the typed options of a spec; raises as `build`, and builds nothing."""
    name, texts = split(spec)
    if name not in registry:
        why = (
            "; its module is not imported, and files import none"
            if ":" in name
            else near(name, registry)
        )
        raise ValueError(f"unknown {kind} {name!r}{why}")
    read = getattr(registry, "options", None)
    known = options_of(registry[name]) if read is None else read(name)
    return name, _typed(texts, known, f"{kind} {name!r}")


def typed(texts: Mapping[str, str], entry: Callable, where: str) -> dict[str, Any]:
    """The options as the entry's annotations want them; ValueError for an unknown one."""
    return _typed(texts, options_of(entry), where)


def _typed(
    texts: Mapping[str, str], known: Mapping[str, inspect.Parameter], where: str
) -> dict[str, Any]:
    values = {}
    for key, text in texts.items():
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}{near(key, known)}")
        values[key] = _convert(text, known[key], f"{where}: {key}")
    return values


def options_of(entry: Callable) -> dict[str, inspect.Parameter]:
    """The options a spec may set: the keyword parameters that have a default.

    A dataclass field with metadata {"spec": False} is none of them.
    """
    parameters = inspect.signature(entry, eval_str=True).parameters
    fields = dataclasses.fields(entry) if dataclasses.is_dataclass(entry) else ()
    hidden = {f.name for f in fields if not f.metadata.get("spec", True)}
    empty = inspect.Parameter.empty
    return {n: p for n, p in parameters.items() if p.default is not empty and n not in hidden}


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'tova'? (known: ...)`, for errors about a word that is none of the known."""
    close = difflib.get_close_matches(word.strip(), known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"{guess} (known: {', '.join(sorted(known)) or 'none'})"


def _convert(text: str, parameter: inspect.Parameter, where: str) -> Any:
    kinds = [parameter.annotation]
    if typing.get_origin(parameter.annotation) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(parameter.annotation))
    if type(None) in kinds:
        if text.lower() == "none":
            return None
        kinds.remove(type(None))
    for kind in kinds:
        try:
            return _as(text, kind)
        except ValueError:
            continue
    names = " or ".join(_name(kind) for kind in kinds)
    raise ValueError(f"{where}={text!r}, expected {names}")


def _as(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            raise ValueError(text)
        return choices[text]
    if kind is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(text)
        return text.lower() in _TRUE
    return parse_int(text) if kind is int else kind(text)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {int: "an integer", float: "a number", bool: "true or false"}.get(kind, kind.__name__)


def format_spec(name: str, options: Mapping[str, Any], entry: Callable) -> str:
    """The shortest spec for these options of `entry`: defaults are left out."""
    known = options_of(entry)
    parts = [name]
    for key, value in options.items():
        if value != known[key].default:
            parts.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return ":".join(parts)
