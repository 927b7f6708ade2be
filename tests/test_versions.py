"""What pyproject promises is what passed; what we take over from transformers is still there."""

from __future__ import annotations

import functools
import inspect
import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from statewright.hf.bounded import BoundedCache, BoundedHybridLayer, BoundedLayer
from statewright.hf.cache import StateCache
from statewright.models import StatewrightConfig, StatewrightForCausalLM, StatewrightModel
from statewright.models.generation import StateGenerationMixin
from statewright.models.pretrained import StatewrightPreTrainedModel

ROOT = Path(__file__).parents[1]
SITE = "lib/python3/site-packages"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Ours, transformers', and the private names of theirs that we define on purpose. Any other private
# name of ours is free: theirs would be replaced in silence if it came to be called the same.
HOOKS = [
    (StateCache, Cache, set()),
    (BoundedCache, Cache, set()),
    (BoundedLayer, CacheLayerMixin, set()),
    (BoundedHybridLayer, LinearAttentionLayer, set()),
    (
        StateGenerationMixin,
        GenerationMixin,
        {
            "_prefill",
            "_prepare_cache_for_generation",
            "_prepare_position_ids_for_generation",
            "_update_model_kwargs_for_generation",
        },
    ),
    (StatewrightPreTrainedModel, GenerationMixin, {"_supports_default_dynamic_cache"}),
    (
        StatewrightPreTrainedModel,
        PreTrainedModel,
        {"_init_weights", "_is_stateful", "_no_split_modules", "_upload_modified_files"},
    ),
    (StatewrightModel, PreTrainedModel, set()),
    (StatewrightForCausalLM, PreTrainedModel, {"_tied_weights_keys"}),
    (StatewrightConfig, PreTrainedConfig, set()),
]
# What else we read or set that transformers does not promise to keep.
READ = [
    (PreTrainedConfig, "_attn_implementation"),
    (PreTrainedModel, "_hf_peft_config_loaded"),
    (PreTrainedModel, "loss_function"),
    (Cache, "is_linear"),
    (LinearAttentionLayer, "lazy_initialization"),
]


@pytest.fixture(scope="module")
def script() -> dict:
    sys.path.insert(0, str(ROOT / "versions"))
    try:
        return runpy.run_path(str(ROOT / "versions" / "run.py"))
    finally:
        sys.path.remove(str(ROOT / "versions"))


def test_the_bounds_are_what_passed(script) -> None:
    """Change a bound, and `make test-versions` has to pass before this does."""
    passed = json.loads(script["PASSED"].read_text())
    lowest, newest = passed["lowest"], passed["newest"]
    for requirement in script["dependencies"]():
        name, bound = requirement.name, Version(script["lower_bound"](requirement))
        if name == "torch":
            assert bound.release[:2] == Version(lowest[name]).release[:2]
        else:
            assert bound == Version(lowest[name]), name
        assert requirement.specifier.contains(newest[name]), name
    assert script["lowest"]() == [
        f"{r.name}=={script['lower_bound'](r)}"
        for r in script["dependencies"]()
        if r.name != "torch"
    ]
    (theirs,) = (r for r in script["dependencies"]() if r.name == "transformers")
    major, minor = Version(newest["transformers"]).release[:2]
    assert f"<{major}.{minor + 1}" in str(theirs.specifier).split(",")


def test_the_newest_torch_that_was_tried_passed(script) -> None:
    passed = json.loads(script["PASSED"].read_text())["torch"]
    assert Version(passed["torch"]).base_version == script["TORCH"]
    for requirement in script["dependencies"]():
        assert requirement.specifier.contains(passed[requirement.name]), requirement


def test_what_make_installs_is_in_the_ranges(script) -> None:
    ranges = {r.name: r.specifier for r in script["dependencies"]()}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {pin.name: clause.version for pin in pins for clause in pin.specifier}
    # Beside what a user gets stand the tools of the tests and of the site.
    assert versions.keys() & ranges.keys() == {"torch", "transformers"}
    assert all(ranges[name].contains(versions[name]) for name in ("torch", "transformers"))
    assert all(clause.operator == "==" for pin in pins for clause in pin.specifier)
    assert script["tested_torch"]() in map(str, pins)


def test_a_dependency_without_a_lower_bound_is_refused(script) -> None:
    for text in ("numpy", "numpy<3", "numpy==2.0"):
        with pytest.raises(ValueError, match="has no lower bound"):
            script["lower_bound"](Requirement(text))


def test_every_extra_is_tried_and_every_test_there(script) -> None:
    assert script["VERBS"].keys() == PROJECT["optional-dependencies"].keys()
    assert all(commands for commands in script["VERBS"].values())
    missing = [t for t in script["TESTS"] if not (ROOT / "tests" / f"test_{t}.py").is_file()]
    assert missing == []


@pytest.mark.parametrize(
    ("ours", "theirs", "hooks"), HOOKS, ids=lambda x: getattr(x, "__name__", "")
)
def test_private_names_of_transformers_that_we_take_over(ours, theirs, hooks: set[str]) -> None:
    known = {name for base in theirs.__mro__ for name in vars(base)}
    mine = {n for n in vars(ours) if n.startswith("_") and not n.startswith(("__", "_abc_"))}
    assert mine & known == hooks
    for name in hooks:
        hook, original = vars(ours)[name], inspect.getattr_static(theirs, name)
        if inspect.isfunction(hook) and inspect.isfunction(original):
            given = list(inspect.signature(hook).parameters.values())
            named = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert named == list(inspect.signature(original).parameters)[: len(named)], name


@pytest.mark.parametrize(("theirs", "name"), READ, ids=lambda x: getattr(x, "__name__", x))
def test_what_we_read_of_transformers_is_there(theirs, name: str) -> None:
    assert any(name in vars(base) for base in theirs.__mro__)


def test_a_stopped_run_goes_on(script, tmp_path, capsys) -> None:
    """What passed on this tree is not run again until all has; a failure is one line."""
    ran: list[str] = []
    broken = {"b"}

    def step(name: str) -> None:
        ran.append(name)
        if name in broken:
            raise subprocess.CalledProcessError(1, ["python", "-m", "pytest"])

    def run(tree: str) -> list[str]:
        ran.clear()
        steps = {name: functools.partial(step, name) for name in "abc"}
        return script["Progress"](tree, tmp_path / "new" / "progress.json").run(steps)

    assert run("tree") == ["b: -m pytest ... failed"] and ran == ["a", "b", "c"]
    said = capsys.readouterr().out
    assert "[1/3] a: passed after 0 s" in said and "[2/3] b: failed after 0 s" in said
    broken.clear()
    assert run("other tree") == [] and ran == ["a", "b", "c"]
    broken.add("b")
    assert run("tree") and ran == ["a", "b", "c"]
    broken.clear()
    assert run("tree") == [] and ran == ["b"]
    assert "[1/3] a: passed before, in 0 s" in capsys.readouterr().out
    assert run("tree") == [] and ran == ["a", "b", "c"]


def test_a_digest_knows_every_file_but_what_is_made(script, monkeypatch, tmp_path) -> None:
    digest = script["digest"]
    monkeypatch.setitem(digest.__globals__, "ROOT", tmp_path)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    seen = {digest("folder", "file")}
    for name in ("folder/deep/a.py", "folder/b.py", "file"):
        for text in ("one", "two"):
            (tmp_path / name).write_text(text)
            seen.add(digest("folder", "file"))
    assert len(seen) == 7
    for name in ("folder/passed.json", "folder/deep/a.pyc", "folder/lib.so"):
        (tmp_path / name).write_text("made")
    assert digest("folder", "file") in seen


def test_an_environment_is_kept_if_it_holds_the_same(script, monkeypatch, tmp_path) -> None:
    kind, installed = script["Environment"], []
    monkeypatch.setitem(kind.__init__.__globals__, "HOME", tmp_path)
    monkeypatch.setattr(kind, "install", lambda self, *what: installed.append(what))
    made = kind.__init__.__globals__["venv"]
    monkeypatch.setattr(made, "create", lambda home, **_: (home / SITE).mkdir(parents=True))
    first = kind("base", keep=("torch==1",))
    kind("base", keep=("torch==1",))
    assert installed == [("torch==1",)] and first.site == tmp_path / "base" / SITE
    kind("base", keep=("torch==2",))
    over = kind("over", first)
    assert installed[1:] == [("torch==2",)]
    assert (over.site / "zz_bases.pth").read_text() == f"{first.site}\n"
    (first.home / "installed.json").unlink()  # stopped before the end
    kind("base", keep=("torch==2",))
    assert len(installed) == 3


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("print('well')", "no error"),
        ("import sys; sys.exit('a\\nb')", "b"),
        ("1 / 0", "Traceback (most recent call last):"),
        ("import sys; sys.exit(3)", "no message"),
    ],
)
def test_what_a_command_without_its_extra_says(script, tmp_path, code: str, line: str) -> None:
    bare = SimpleNamespace(home=tmp_path, python=sys.executable)
    bare.run = functools.partial(script["Environment"].run, bare)
    last_line = script["check_extra"].__globals__["last_line"]
    assert last_line(bare, ["-c", code], tmp_path, {}) == line
