"""The mixer of CONTRIBUTING.md as it stands there, and how a method that is missing is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from statewright import laws
from statewright.mixers.base import Mixer, VectorMixer

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(RECIPE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
NEEDED = ("init_state", "random_state", "check", "update")


@pytest.fixture(scope="module")
def recipe() -> dict:
    names: dict = {}
    exec(RECIPE, names)
    return names


@pytest.mark.parametrize("flags", [False, True])
def test_the_recipe_keeps_every_law(recipe: dict, flags: bool) -> None:
    found = laws.check(recipe["Leaky"](5).double(), laws.Case(flags=flags, length=9, splits=(4,)))
    assert len(found) == len(laws.LAWS) and all(finding.ok for finding in found)


@pytest.mark.parametrize("name", NEEDED)
def test_a_method_that_is_missing_is_named(recipe: dict, name: str) -> None:
    class Lacking(recipe["Leaky"]):
        pass

    setattr(Lacking, name, getattr(Mixer, name))
    with pytest.raises(NotImplementedError, match=f"Lacking has no method '{name}'"):
        laws.check(Lacking(5).double(), laws.Case(length=5, splits=(2,)))


def test_vector_mixers_name_theirs() -> None:
    class Bare(VectorMixer):
        pass

    mixer = Bare(4, 2, 1, bias=True, offset=0.0)
    for call, name in (
        (lambda: mixer.init_state(1), "initial"),
        (lambda: mixer.gates(torch.zeros(1, 1, 4)), "gates"),
        (lambda: mixer.update(torch.zeros(1, 4), None), "update"),
    ):
        with pytest.raises(NotImplementedError, match=f"Bare has no method '{name}'"):
            call()
