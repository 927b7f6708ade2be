"""`from statewright import ...`: every public name, lazily, whatever was imported before."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import statewright
from statewright.mixers import MIXERS
from statewright.policies import POLICIES
from statewright.registry import Registry

ROOT = Path(__file__).parents[1]
CATALOG = (ROOT / "statewright/catalog.py").read_text()
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


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand in the API reference, after `from statewright import *`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    value = getattr(statewright, name)
    if isinstance(value, Registry):
        return  # a table: `test_the_api_reference_has_every_name` asks for the words under it
    space = {"torch": torch, "Path": Path, **{n: getattr(statewright, n) for n in NAMES}}
    found = doctest.DocTestParser().get_doctest(value.__doc__, space, name, None, None)
    assert found.examples, "no example"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(found, out=report.append)
    assert failed == 0, "".join(report)


@pytest.mark.parametrize("group", statewright.GROUPS)
def test_the_api_reference_has_every_name(group: str) -> None:
    """A page per group, its names in the table's order; `make docs` draws them from the sources."""
    names = [n for homes in statewright.GROUPS[group].values() for n in homes.split()]
    page = (ROOT / f"docs/api/{group}.md").read_text()
    assert re.findall(r"^::: statewright\.(\w+)$", page, re.M) == names
    index = (ROOT / "docs/api/index.md").read_text()
    assert f"]({group}.md) | {', '.join(f'`{n}`' for n in names)} |" in index
    assert f": api/{group}.md\n" in (ROOT / "mkdocs.yml").read_text()
    for name in names:
        if isinstance(getattr(statewright, name), Registry):
            assert re.search(rf'^{name} = .*?^\)\n""".+"""$', CATALOG, re.M | re.S), name
