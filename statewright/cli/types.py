"""Types of options. A mistake in one is told at once: nothing here imports torch."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from statewright.catalog import BOUNDS, MIXERS, POLICIES, TASKS
from statewright.registry import Registry
from statewright.signatures import read_names
from statewright.spec import near, parse_int, split

Param, Context = click.Parameter | None, click.Context | None


class Count(click.ParamType):
    """An integer within bounds; 64k is 65,536."""

    name = "count"

    def __init__(self, least: int = 0, most: int | None = None) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: Param, ctx: Context) -> int:
        try:
            number = value if isinstance(value, int) else parse_int(value)
        except ValueError:
            self.fail(f"{value!r} is not a count such as 512 or 64k", param, ctx)
        if number < self.least:
            self.fail(f"{number}, expected at least {self.least}", param, ctx)
        if self.most is not None and number > self.most:
            self.fail(f"{number}, expected at most {self.most:,}", param, ctx)
        return number


COUNT, POSITIVE = Count(), Count(1)
# What every generator takes; samples count on from it.
SEED = Count(most=2**63 - 1)


class Number(click.ParamType):
    """A finite number from `least` (or above it) to `most`."""

    name = "number"

    def __init__(self, least: float, most: float = math.inf, above: bool = False) -> None:
        self.least, self.most, self.above = least, most, above

    def convert(self, value: Any, param: Param, ctx: Context) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        low = number > self.least if self.above else number >= self.least
        if not (low and number <= self.most and math.isfinite(number)):
            least = f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
            most = "" if self.most == math.inf else f" and at most {self.most:g}"
            self.fail(f"{value}, expected a number of {least}{most}", param, ctx)
        return number


class Bytes(click.ParamType):
    """A number of bytes: 512MiB, 32GiB, 16GB or a plain integer."""

    name = "bytes"
    _units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

    def convert(self, value: Any, param: Param, ctx: Context) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
        if found is None or found[2] not in self._units:
            self.fail(f"{value!r} is not a size such as 512MiB or 32GiB", param, ctx)
        return int(float(found[1]) * self._units[found[2]])


BYTES = Bytes()


class Sizes(Bytes):
    """Several numbers of bytes, with commas between: 64KiB,1MiB."""

    name = "sizes"

    def convert(self, value: Any, param: Param, ctx: Context) -> Any:
        if isinstance(value, tuple):
            return value
        return tuple(super(Sizes, self).convert(one, param, ctx) for one in value.split(","))


SIZES = Sizes()


class Spec(click.ParamType):
    """A spec of a registry, checked without its class; a class of one's own is imported here."""

    name = "spec"

    def __init__(self, registry: Registry, without: str = "") -> None:
        self.registry, self.without = registry, without

    def convert(self, value: str, param: Param, ctx: Context) -> str:
        if self.without and value.strip().lower() == self.without:
            return value
        try:
            for name in (split(part)[0] for part in self.registry.parts(value)):
                if ":" in name and name not in self.registry:
                    _import_from_here()
                    self.registry.admit(name)
            self.registry.check(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """Names, and after a name and a colon its options."""
        joint = self.registry.joint
        before, _, last = incomplete.rpartition(joint) if joint else ("", "", incomplete)
        before += joint if before else ""
        head, colon, option = last.rpartition(":")
        if not colon:
            names = [self.without] * bool(self.without and not before) + list(self.registry)
            return _completions(before, names, last)
        name = split(head)[0]
        if name not in self.registry.homes:
            return []
        options = [f"{option}=" for option in self.registry.options(name)]
        return _completions(f"{before}{head}:", options, option)


def _completions(before: str, words: Iterable[str], begin: str) -> list[CompletionItem]:
    return [CompletionItem(before + word) for word in words if word.startswith(begin)]


def _import_from_here() -> None:
    """Modules of the working directory can be named, as under `python -m`."""
    if "" not in sys.path:
        sys.path.insert(0, "")


POLICY, BOUND = Spec(POLICIES, "none"), Spec(BOUNDS, "none")
MIXER, TASK = Spec(MIXERS), Spec(TASKS)


class Names(click.ParamType):
    """One of the names that stand at "module:NAMES"; with `several`, commas between."""

    name = "names"

    def __init__(self, home: str, kind: str, several: bool = False) -> None:
        self.home, self.kind, self.several = home, kind, several

    def convert(self, value: str, param: Param, ctx: Context) -> str:
        known = read_names(self.home)
        for word in value.split(",") if self.several else [value]:
            if word.strip() not in known and (word.strip() or not self.several):
                self.fail(f"unknown {self.kind} {word.strip()!r}{near(word, known)}", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        before, _, last = incomplete.rpartition(",") if self.several else ("", "", incomplete)
        return _completions(f"{before}," if before else "", read_names(self.home), last)


FAMILY = Names("statewright.hf.families:FAMILIES", "family")


class Text(click.Path):
    """A file that is there; files of like names are named if it is not."""

    name = "file"

    def convert(self, value: Any, param: Param, ctx: Context) -> str:
        path = Path(value)
        if path.is_dir():
            self.fail(f"{path} is a directory, expected a file", param, ctx)
        if not path.exists():
            self.fail(f"{path}: no such file{_beside(path)}", param, ctx)
        return str(value)


def _beside(path: Path) -> str:
    """`; did you mean book.txt?`, of the names in the directory."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


TEXT = Text()


class Model(click.Path):
    """A directory, an id, or a name of `hf.pretrained`, which becomes its directory."""

    name = "model"

    def convert(self, value: Any, param: Param, ctx: Context) -> str:
        from statewright.hf.hub import require_reachable

        found = self.located(value)
        try:
            if value and value not in self.words() and not Path(found).exists():
                require_reachable(found)
        except ValueError as error:
            close = difflib.get_close_matches(str(value), self.words(), n=1)
            named = f"; did you mean {close[0]}?" if close else _beside(Path(value))
            self.fail(f"{error}{named}", param, ctx)
        return found

    def words(self) -> Iterable[str]:
        """Names that are no directories."""
        from statewright.demos import MODELS, PREFIX
        from statewright.hf.pretrained import PRETRAINED

        return (*PRETRAINED, *(PREFIX + name for name in MODELS))

    def located(self, value: Any) -> str:
        from statewright.hf.pretrained import locate

        return str(locate(value))

    def complete_names(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """The names alone, for what takes no directory."""
        return _completions("", self.words(), incomplete)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        named = self.complete_names(ctx, param, incomplete)
        return named + super().shell_complete(ctx, param, incomplete)


class Tokenizer(Model):
    """bytes, characters, or a directory or an id that holds a tokenizer."""

    name = "tokenizer"

    def words(self) -> Iterable[str]:
        return ("bytes", "characters")

    def located(self, value: Any) -> str:
        return str(value)


MODEL, TOKENIZER = Model(), Tokenizer()
