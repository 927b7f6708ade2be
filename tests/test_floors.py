"""The house: who may import whom and when, how long a file may be, what no library file does."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "statewright"
FLOORS = {
    0: [
        "state",
        "spec",
        "signatures",
        "registry",
        "catalog",
        "shapes",
        "names",
        "intervals",
        "ragged",
        "state_file",
        "text_file",
        "precision",
        "token_hash",
        "token_text",
        "cells",
        "provenance",
        "places",
    ],
    1: ["ops", "tasks", "demos"],
    2: ["policies"],
    3: ["mixers"],
    4: ["hf"],
    5: ["models"],
    6: ["session", "history", "laws"],
    7: ["evaluation", "checks"],
    8: ["train"],
    9: ["diagnosis"],
    10: ["studies"],
    11: ["bench", "report"],
    12: ["cli"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem[:2] != "__")
LIBRARY = [p for p in MODULES if "cli" not in p.relative_to(PACKAGE).parts]
WRITTEN = sorted(
    path
    for path in [*PACKAGE.rglob("*.*"), *(ROOT / "tests").rglob("*.*")]
    if path.suffix in (".py", ".c", ".h")
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module of ours that a source imports anywhere, in functions too, by full name."""
    found: set[str] = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else base for name in names}
    ours = {name for name in found if name.startswith("statewright.")}
    return {name for name in ours if is_module(name)}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_in(path: Path) -> set[str]:
    return imports_of(path.read_text(), name_of(path), path.name == "__init__.py")


def trespasses(module: str, imported: set[str]) -> list[str]:
    """What a module may not import: anything of a higher floor, or beside it on its own."""
    own = module.split(".")[1]
    wrong = []
    for name in sorted(imported):
        other = name.split(".")[1]
        beside = FLOOR[other] == FLOOR[own] and not (single(own) and single(other))
        if other != own and (FLOOR[other] > FLOOR[own] or beside):
            wrong.append(name)
    return wrong


def single(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists()


def test_imports_go_down() -> None:
    modules = [name_of(path) for path in MODULES]
    assert [m for m in modules if m.split(".")[1] not in FLOOR] == [], "no floor in the table"
    wrong = {name_of(path): trespasses(name_of(path), imports_in(path)) for path in MODULES}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_the_rule_sees_trespassers() -> None:
    """The check itself: upwards, sideways, inside functions and relative imports are seen."""
    source = "def f():\n    from statewright.train import loop\n    from ..models import lm\n"
    found = imports_of(source, "statewright.mixers.conv")
    assert {"statewright.train.loop", "statewright.models.lm"} <= found
    assert trespasses("statewright.mixers.conv", found) == sorted(found)
    assert trespasses("statewright.cli.size", found) == []
    assert trespasses("statewright.mixers.gru", {"statewright.mixers.conv"}) == []
    assert trespasses("statewright.session", {"statewright.history"}) == []


def test_no_cycles() -> None:
    """A package's own `__init__` gathers its modules; those must not import it back."""
    graph = {name_of(path): imports_in(path) - {name_of(path)} for path in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) >= len(MODULES) > 20


def test_files_are_short() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in WRITTEN}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def calls_in(source: str) -> set[str]:
    """Names of all functions and methods that are called."""
    called = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {f.id for f in called if isinstance(f, ast.Name)}
    return names | {f".{f.attr}" for f in called if isinstance(f, ast.Attribute)}


def test_library_files_neither_print_nor_choose_a_device() -> None:
    assert calls_in("print(x.cuda())") == {"print", ".cuda"}
    found = {str(p): calls_in(p.read_text()) & {"print", ".cuda"} for p in LIBRARY}
    assert {path: calls for path, calls in found.items() if calls} == {}


_MODULES = (
    "import sys, statewright.cli as c; c.main(['{}']); sys.stderr.write(' '.join(sys.modules))"
)


@pytest.mark.parametrize("argument", ["--help", "train --help", "--version"])
def test_help_imports_nothing_heavy(argument: str) -> None:
    code = _MODULES.format("','".join(argument.split()))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "statewright" in done.stdout
    modules = set(done.stderr.split())
    assert "click" in modules
    assert not modules & {"torch", "transformers", "numpy", "rich", "safetensors"}


def test_help_is_fast() -> None:
    """Under 0.3 s from nothing, in processor time, so that a busy machine changes nothing."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = [sys.executable, "-m", "statewright", "--help"]
        done = subprocess.run(argv, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stderr == ""
        for verb in ("quickstart", "train", "generate", "size", "state", "list"):
            assert verb in done.stdout
    assert min(times) < 0.3
