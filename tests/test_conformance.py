"""The judge of transformers' conformance run; the run itself is `make conformance`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("conformance_run", ROOT / "conformance" / "run.py")
conformance = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(conformance)

PAGE = """
| test | mixers | reason |
|---|---|---|
| `test_of_all` | all | some reason |
| `test_of_two` | gla, s4 | another | with a bar |
"""
KNOWN = {("gla", "test_of_all"), ("gru", "test_of_all"), ("gla", "test_of_two")}


def test_the_page_says_what_fails() -> None:
    found = conformance.known_failures(PAGE, ["gla", "gru"])
    assert found == KNOWN | {("s4", "test_of_two")}
    real = conformance.PAGE.read_text(encoding="utf-8")
    assert conformance.known_failures(real, ["mingru"])


@pytest.mark.parametrize(
    ("failed", "passed", "lines"),
    [
        (KNOWN, set(), []),
        (KNOWN - {("gru", "test_of_all")}, set(), []),  # not run: says nothing
        (KNOWN | {("gla", "test_new")}, set(), ["gla: test_new fails and is not listed"]),
        (
            KNOWN - {("gru", "test_of_all")},
            {("gru", "test_of_all")},
            ["gru: test_of_all is listed as failing and passes"],
        ),
    ],
)
def test_any_difference_is_a_line(failed: set, passed: set, lines: list[str]) -> None:
    assert conformance.differences(failed, KNOWN, passed) == lines


def test_a_failing_subtest_fails_its_test() -> None:
    outcomes = conformance.Outcomes()

    def report(test: str, outcome: str, when: str = "call", **more) -> None:
        at = f"suite.py::Test_gla::{test}"
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(nodeid=at, outcome=outcome, when=when, **more)
        )

    for test in ("test_whole", "test_part"):
        report(test, "passed", "setup")
        report(test, "passed", context="a subtest")
    report("test_part", "failed", context="another")
    report("test_whole", "passed")
    report("test_part", "passed")
    report("test_other", "skipped", "setup")
    assert outcomes.table() == {"gla": [1, 1, 1]}


def test_a_source_without_tests_is_one_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--source", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        conformance.main()
    assert stop.value.code == 2 and "no tests/test_modeling_common.py" in capsys.readouterr().err
