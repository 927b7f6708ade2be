"""Names of specs: options read from source without torch, and classes of the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from statewright import spec
from statewright.catalog import BOUNDS, MIXERS, POLICIES, TASKS
from statewright.signatures import read_least
from statewright.tasks import CHOMSKY

REGISTRIES = {"bounds": BOUNDS, "mixers": MIXERS, "policies": POLICIES, "tasks": TASKS}
EVERY = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_options_read_from_source_are_the_class_s_own(kind: str, name: str) -> None:
    registry = REGISTRIES[kind]
    read, true = registry.options(name), spec.options_of(registry[name])
    assert {n: (p.default, p.annotation) for n, p in read.items()} == {
        n: (p.default, p.annotation) for n, p in true.items()
    }
    assert registry.summary(name) == (registry[name].__doc__ or "").split("\n")[0] != ""


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_least_value_is_one_that_the_class_refuses_to_go_below(kind: str, name: str) -> None:
    """What is read from the source beforehand, the class says of itself, too."""
    registry = REGISTRIES[kind]
    for option, least in read_least(registry.homes[name]).items():
        text = f"{name}:{option}={least - 1}"
        said = f"{option}={least - 1}.*expected"
        with pytest.raises(ValueError, match=f"{option}={least - 1}, expected at least {least}"):
            registry.check(text)
        registry.check(f"{name}:{option}={least}")
        with pytest.raises(ValueError, match=said):
            spec.build(text, registry, registry.kind)


def test_every_chomsky_task_is_listed() -> None:
    assert {name: TASKS[name] for name in CHOMSKY} == CHOMSKY


def test_checking_every_spec_imports_no_torch() -> None:
    code = (
        "import sys; from statewright.catalog import *; from statewright import catalog as c\n"
        "for r in (c.BOUNDS, c.MIXERS, c.TASKS):\n"
        "    for name in r:\n"
        "        r.check(name)\n"
        "        for option, p in r.options(name).items():\n"
        "            try: r.check(f'{name}:{option}x=1')\n"
        "            except ValueError as e: assert f'did you mean {option!r}' in str(e), e\n"
        "            else: raise SystemExit(name)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


OWN = """
import subprocess
from dataclasses import dataclass
from statewright.policies import Window

@dataclass(frozen=True)
class Mine(Window):
    '''A window of my own.'''
    extra: int = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "own_policies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_policies:Mine"
    sys.modules.pop("own_policies", None)


def test_a_class_of_ones_own_is_built_once_its_module_is_imported(own: str) -> None:
    with pytest.raises(ValueError, match="unknown policy 'own_policies:Mine'; its module is not"):
        spec.build(f"{own}:budget=4", POLICIES, "policy")
    assert "own_policies" not in sys.modules
    POLICIES.admit(own)
    policy = spec.build(f"{own}:budget=4:sinks=1", POLICIES, "policy")
    assert type(policy).__name__ == "Mine" and (policy.budget, policy.sinks) == (4, 1)
    assert POLICIES.name_of(type(policy)) == own
    with pytest.raises(ValueError, match="has no option 'extr'; did you mean 'extra'"):
        POLICIES.check(f"{own}:extr=4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("own_policies:Yours", "own_policies has no class 'Yours'"),
        ("own_policies:subprocess", "has no class 'subprocess'"),
        ("subprocess:Popen", "not a policy"),
        ("statewright.mixers.gla:GLA", "not a policy"),
    ],
)
def test_what_is_no_policy_is_refused(own: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POLICIES.admit(name)
    assert name not in POLICIES
    with pytest.raises(ValueError, match=r"unknown policy|expected name:key=value"):
        spec.build(name, POLICIES, "policy")


def test_a_task_and_a_mixer_of_ones_own_are_named_the_same_way() -> None:
    assert TASKS["statewright.tasks.mqar:MQAR"] is TASKS["mqar"]
    assert MIXERS["statewright.mixers.gla:GLA"] is MIXERS["gla"]
    assert "subprocess:Popen" not in TASKS
