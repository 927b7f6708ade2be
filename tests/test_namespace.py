"""`from statewright import ...`: every public name, lazily, whatever was imported before."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import statewright
from statewright.mixers import MIXERS
from statewright.policies import POLICIES

ROOT = Path(__file__).parents[1]
NAMES = [name for name in statewright.__all__ if name != "__version__"]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "rich", "click", "ast", "inspect"}


def test_importing_it_is_free() -> None:
    code = "import sys; old = {*sys.modules}; import statewright; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "statewright" in loaded
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("statewright.")} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_depends_on_what_was_imported(name: str) -> None:
    """A submodule of that name would take its place in the package once somebody imports it."""
    value = getattr(statewright, name)
    module = f"statewright.{name}"
    if importlib.util.find_spec(module) is not None:
        assert value is importlib.import_module(module)


def test_the_packages_beside_verbs_were_renamed() -> None:
    importlib.import_module("statewright.diagnosis")
    importlib.import_module("statewright.evaluation")
    from statewright import check, diagnose, evaluate, load, repair, resize

    for verb in (check, diagnose, evaluate, load, repair, resize):
        assert callable(verb) and verb.__module__.startswith("statewright.")


def test_every_registered_class_is_public() -> None:
    for cls in [*MIXERS.values(), *POLICIES.values()]:
        assert getattr(statewright, cls.__name__) is cls


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "statewright/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name, "without `as` it is not exported"
            seen[alias.name] = node.module
    homes = {n: "statewright" if n == h else f"statewright.{h}" for n, h in homes_of().items()}
    assert seen == homes


def homes_of() -> dict[str, str]:
    return {
        name: home
        for homes in statewright.GROUPS.values()
        for home, names in homes.items()
        for name in names.split()
    }


def test_unknown_names_and_dir() -> None:
    with pytest.raises(AttributeError, match="'statewright' has no attribute 'Nothing'"):
        _ = statewright.Nothing
    assert set(NAMES) <= set(dir(statewright))
    space: dict[str, object] = {}
    exec("from statewright import *", space)
    assert set(NAMES) <= space.keys()
    assert space["__version__"] == statewright.__version__


def test_the_version_stands_in_one_place() -> None:
    from statewright.provenance import versions

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, dynamic = settings["project"], settings["tool"]["setuptools"]["dynamic"]
    assert project["dynamic"] == ["version"] and "version" not in project
    assert dynamic["version"] == {"attr": "statewright.__version__"}
    tree = ast.parse((ROOT / "statewright/__init__.py").read_text())
    literals = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    assert any(isinstance(v, ast.Constant) and v.value == statewright.__version__ for v in literals)
    # Not the metadata of whatever was installed once: an editable checkout may be newer.
    assert versions(["statewright"]) == {"statewright": statewright.__version__}
    code = [sys.executable, "-m", "statewright", "--version"]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(f" {statewright.__version__}")
