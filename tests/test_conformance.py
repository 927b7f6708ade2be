"""The judge of transformers' conformance run; the run itself is `make conformance`."""

from __future__ import annotations

import importlib.util
import subprocess
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


def checkout(place: Path, version: str | None) -> Path:
    (place / "tests").mkdir(parents=True)
    (place / "tests" / "test_modeling_common.py").touch()
    if version:
        package = place / "src" / "transformers" / "__init__.py"
        package.parent.mkdir(parents=True)
        package.write_text(f'a = 1\n__version__ = "{version}"\n')
    return place


def test_a_folder_without_tests_is_one_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--tests", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        conformance.main()
    assert stop.value.code == 2 and "no tests/test_modeling_common.py" in capsys.readouterr().err


def test_tests_of_another_version_are_refused(tmp_path) -> None:
    same, other, unknown = (checkout(tmp_path / str(v), v) for v in ("5.1", "5.2", None))
    for home in (same, unknown):
        assert conformance.checkout(home, "5.1") == conformance.checkout(home / "tests", "5.1")
    with pytest.raises(ValueError, match=r"transformers 5\.2, but 5\.1 is installed"):
        conformance.checkout(other, "5.1")


def test_without_github_one_line_says_what_is_missing(monkeypatch, tmp_path, capsys) -> None:
    def unreachable(version: str, home: Path) -> None:
        (home / "half").touch()
        raise subprocess.CalledProcessError(128, "git", stderr="Cloning\nno such host")

    monkeypatch.setattr(conformance, "BUILD", tmp_path)
    monkeypatch.setattr(conformance, "_clone", unreachable)
    monkeypatch.setattr(conformance, "_download", lambda _, home: (home / "tests").mkdir())
    for _ in range(2):
        home = conformance.fetch("5.1")
        assert home == tmp_path / "pypi-5.1" and (home / "tests").is_dir()
        (line,) = capsys.readouterr().err.splitlines()
        assert "no such host" in line and "--tests DIR takes a checkout of v5.1" in line
    monkeypatch.setattr(conformance, "_download", unreachable)
    with pytest.raises(ValueError, match=r"PyPI has no source of transformers 5\.2"):
        conformance.fetch("5.2")
    monkeypatch.setattr(conformance, "_clone", lambda _, home: (home / "tests").mkdir())
    assert conformance.fetch("5.1") == tmp_path / "transformers-5.1"
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pypi-5.1", "transformers-5.1"]
