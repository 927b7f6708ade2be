"""Options of our classes, read from their source, so that checking a spec needs no torch."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_TORCH_FREE = ("typing", "math", "dataclasses", "pathlib")
_EMPTY = inspect.Parameter.empty
_Parameters = dict[str, tuple[inspect.Parameter, dict[str, Any]]]


@functools.cache
def read_options(home: str) -> dict[str, inspect.Parameter]:
    """As `spec.options_of` of the class at `home`, "package.module:Class", which is not imported.

    That is a dataclass of ours, or a class whose `__init__`, or that of a base, has defaults.
    """
    module, name = home.split(":")
    return {option: found for option, (found, _) in _read(module).parameters(name).items()}


@functools.cache
def read_least(home: str) -> dict[str, float]:
    """The least value of each option whose field's metadata says one: {"least": 1}."""
    module, name = home.split(":")
    found = _read(module).parameters(name)
    return {option: about["least"] for option, (_, about) in found.items() if "least" in about}


@functools.cache
def read_summary(home: str) -> str:
    """The first line of the class's docstring."""
    module, name = home.split(":")
    text = ast.get_docstring(_read(module).classes[name]) or ""
    return text.split("\n")[0]


@functools.cache
def read_names(home: str) -> tuple[str, ...]:
    """The names at "package.module:NAMES": the keys of a dict, or a tuple of strings."""
    module, name = home.split(":")
    source = _read(module)
    node = source.values[name]
    keys = node.keys if isinstance(node, ast.Dict) else [node]
    values = [source.value(key) for key in keys if key is not None]
    return tuple(values if isinstance(node, ast.Dict) else values[0])


@functools.cache
def _read(module: str) -> _Source:
    return _Source(module)


class _Source(Mapping[str, Any]):
    """A module's classes, and the values of its names as far as they need no torch."""

    def __init__(self, module: str) -> None:
        path = _ROOT.joinpath(*module.split(".")).with_suffix(".py")
        body = ast.parse(path.read_text(encoding="utf-8")).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self.values = {
            target.id: node.value
            for node in body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        self.imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def __getitem__(self, name: str) -> Any:
        if name in self.values:
            return self.value(self.values[name])
        home, own = self.imports.get(name, ("builtins", name))
        if home.startswith("statewright."):
            return _read(home)[own]
        if home in _TORCH_FREE:
            return getattr(importlib.import_module(home), own)
        return vars(builtins)[name]

    def __iter__(self):
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def value(self, node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "<signature>", "eval"), {}, self)

    def parameters(self, name: str) -> _Parameters:
        """The options of a class, each with its field's metadata."""
        if name not in self.classes:
            home, own = self.imports.get(name, ("", name))
            return _read(home).parameters(own) if home.startswith("statewright.") else {}
        node = self.classes[name]
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if init:
            return self._arguments(init[0].args)
        found: _Parameters = {}
        for base in reversed(node.bases):
            found |= self.parameters(base.id) if isinstance(base, ast.Name) else {}
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            found |= self._fields(node)
        return found

    def _arguments(self, arguments: ast.arguments) -> _Parameters:
        plain = list(zip(arguments.args[::-1], arguments.defaults[::-1]))[::-1]
        keyword = [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults) if d]
        given = plain + keyword
        return {a.arg: (self._parameter(a.arg, a.annotation, d), {}) for a, d in given}

    def _fields(self, node: ast.ClassDef) -> _Parameters:
        found = {}
        for line in node.body:
            if not isinstance(line, ast.AnnAssign) or line.value is None:
                continue
            default, options = line.value, {}
            if "ClassVar" in ast.unparse(line.annotation):
                continue
            if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
                options = {k.arg: k.value for k in default.keywords}
                default = options.get("default")
            about = self.value(options["metadata"]) if "metadata" in options else {}
            if about.get("spec", True):
                name = line.target.id
                found[name] = self._parameter(name, line.annotation, default), about
        return found

    def _parameter(
        self, name: str, annotation: ast.expr | None, default: ast.expr | None
    ) -> inspect.Parameter:
        kind = _EMPTY if annotation is None else self.value(annotation)
        value = _EMPTY if default is None else self.value(default)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind
        )
