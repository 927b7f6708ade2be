"""Names that specs use. The class behind one is imported when it is used, not when it is named."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from statewright.signatures import read_least, read_options, read_summary
from statewright.spec import parse


@dataclass(frozen=True, eq=False)
class Registry(Mapping[str, Any]):
    """Classes by name, `{"tova": "statewright.policies.tova:TOVA"}`; a mapping name -> class.

    A class of the user's own has the name "package.module:Class" if it is a subclass of `base` (or
    has the method `base`) and its module is imported: a file that names a class runs no code. A
    spec of several parts has `joint` between them.
    """

    kind: str
    homes: Mapping[str, str]
    base: str
    joint: str = ""

    def __getitem__(self, name: str) -> Any:
        if name in self.homes:
            return _class_at(self.homes[name], importlib.import_module)
        own = _class_at(name, sys.modules.get)
        if own is None or not self._fits(own):
            raise KeyError(name)
        return own

    def __contains__(self, name: object) -> bool:
        return name in self.homes or (isinstance(name, str) and self.get(name) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The options that a spec may set; of our classes by their source, torch not needed."""
        from statewright.spec import options_of

        return read_options(self.homes[name]) if name in self.homes else options_of(self[name])

    def summary(self, name: str) -> str:
        """The first line of the class's docstring."""
        return read_summary(self.homes[name])

    def name_of(self, kind: type) -> str:
        """The name of a class: the one it has here, else "package.module:Class"."""
        home = f"{kind.__module__}:{kind.__qualname__}"
        return next((name for name, known in self.homes.items() if known == home), home)

    def check(self, text: str) -> None:
        """ValueError for a wrong name, or an option's wrong name, type or least value.

        Imports no class, so what depends on several options is left to the class.
        """
        for part in self.parts(text):
            name, options = parse(part, self, self.kind)
            least = read_least(self.homes[name]) if name in self.homes else {}
            for option in options.keys() & least.keys():
                value = options[option]
                if isinstance(value, int | float) and not value >= least[option]:
                    raise ValueError(
                        f"{self.kind} {name!r}: {option}={value}, expected at least {least[option]}"
                    )

    def parts(self, text: str) -> list[str]:
        """The specs that are joined in one."""
        return [part.strip() for part in text.split(self.joint)] if self.joint else [text]

    def admit(self, name: str) -> None:
        """Import the module of the user's own class "package.module:Class".

        Raises ValueError if there is no such class, or if it is none of this kind.
        """
        module, _, attribute = name.partition(":")
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the user's module does
            raise ValueError(f"{self.kind} {name!r}: {type(error).__name__}: {error}") from error
        own = _class_at(name, sys.modules.get)
        if own is None:
            raise ValueError(f"{self.kind} {name!r}: {module} has no class {attribute!r}")
        if not self._fits(own):
            raise ValueError(f"{self.kind} {name!r}: not a {self.kind}, expected {self.base}")

    def _fits(self, own: type) -> bool:
        if ":" not in self.base:
            return callable(getattr(own, self.base, None))
        return issubclass(own, _class_at(self.base, importlib.import_module))


def _class_at(home: str, find: Any) -> Any:
    module, _, name = home.partition(":")
    found = getattr(find(module), name, None) if name else None
    return found if isinstance(found, type) else None
