"""Run transformers' conformance mixins on every mixer and compare with docs/conformance.md.

python conformance/run.py [--tests DIR] [--only MIXER ...]

The tests of the installed transformers are fetched once into build/conformance, with git from the
tag. Where that fails they are PyPI's, without the generation tests, or those of DIR: a checkout of
the tag, or its folder `tests`. Exits with 1 if a test fails that the page does not list, or one
that it lists passes; the last lines say which tests ran.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"
BUILD = ROOT / "build" / "conformance"
REPOSITORY = "https://github.com/huggingface/transformers"
Failures = set[tuple[str, str]]
_ROW = re.compile(r"\| `(test_\w+)` \| ([\w, ]+) \| (.+) \|")


def known_failures(page: str, mixers: Iterable[str]) -> Failures:
    """(mixer, test) of every row `| test | mixers or all | reason |` of the page's tables."""
    found = set()
    for test, names, _ in _ROW.findall(page):
        chosen = mixers if names == "all" else names.split(", ")
        found |= {(mixer, test) for mixer in chosen}
    return found


def differences(failed: Failures, known: Failures, passed: Failures) -> list[str]:
    """One line per failure that is not listed and per listed one that passed."""
    new = [f"{mixer}: {test} fails and is not listed" for mixer, test in sorted(failed - known)]
    healed = sorted((known & passed) - failed)
    return new + [f"{mixer}: {test} is listed as failing and passes" for mixer, test in healed]


def fetch(version: str) -> Path:
    """The directory that holds transformers' `tests` of that version, as far as it is to be had.

    ValueError where neither GitHub nor PyPI has them.
    """
    home = BUILD / f"transformers-{version}"
    if not (home / "tests").is_dir():
        try:
            _place(home, lambda part: _clone(version, part))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            print(
                f"{REPOSITORY}: {said}; taking PyPI's tests, which lack those of generation "
                f"(--tests DIR takes a checkout of v{version})",
                file=sys.stderr,
            )
            home = BUILD / f"pypi-{version}"
            if not (home / "tests").is_dir():
                try:
                    _place(home, lambda part: _download(version, part))
                except (OSError, subprocess.SubprocessError) as error:
                    raise ValueError(f"PyPI has no source of transformers {version}") from error
    return home


def _place(home: Path, fill: Callable[[Path], None]) -> None:
    """`home` with all that `fill` writes, or not there."""
    part = home.with_name(f"{home.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        part.replace(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _clone(version: str, home: Path) -> None:
    options = ["--depth=1", "--filter=blob:none", "--sparse", f"--branch=v{version}"]
    for words in (["clone", *options, REPOSITORY, "."], ["sparse-checkout", "set", "tests", "src"]):
        subprocess.run(
            ["git", *words], cwd=home, check=True, capture_output=True, text=True, timeout=900
        )


def _download(version: str, home: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*pip, "--dest", place, f"transformers=={version}"], check=True)
        (archive,) = Path(place).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(place, filter="data")
        shutil.move(Path(place) / f"transformers-{version}" / "tests", home / "tests")


def checkout(place: Path, version: str) -> Path:
    """The directory that holds `tests` of a checkout, or of that folder; ValueError if neither.

    A checkout whose package has another version than the one installed is refused too.
    """
    home = place.parent if place.name == "tests" else place
    if not (home / "tests" / "test_modeling_common.py").is_file():
        raise ValueError(f"--tests {place}: no tests/test_modeling_common.py there")
    package = home / "src" / "transformers" / "__init__.py"
    text = package.read_text(encoding="utf-8") if package.is_file() else ""
    theirs = re.search(r'^__version__ = "(.+)"', text, re.M)
    if theirs and theirs[1] != version:
        raise ValueError(f"--tests {place}: transformers {theirs[1]}, but {version} is installed")
    return home.resolve()


class Outcomes:
    """A pytest plugin: (mixer, test) by outcome; a test fails with any of its subtests."""

    def __init__(self) -> None:
        self.passed: Failures = set()
        self.failed: Failures = set()
        self.skipped: Failures = set()

    def pytest_runtest_logreport(self, report) -> None:
        mixer, test = report.nodeid.partition("::Test_")[2].split("::")
        subtest = hasattr(report, "context")
        if report.outcome == "failed":
            self.failed.add((mixer, test))
        elif report.outcome == "skipped" and not subtest:
            self.skipped.add((mixer, test))
        elif report.when == "call" and not subtest:
            self.passed.add((mixer, test))

    def table(self) -> dict[str, list[int]]:
        """By mixer: passed, failed, skipped."""
        kinds = (self.passed - self.failed, self.failed, self.skipped)
        mixers = sorted({mixer for kind in kinds for mixer, _ in kind})
        return {m: [sum(mixer == m for mixer, _ in kind) for kind in kinds] for m in mixers}


def run(source: Path, only: list[str]) -> Outcomes:
    """Every test of the mixins on the mixers named, in two processes."""
    import pytest

    suite, outcomes = Path(__file__).with_name("suite.py"), Outcomes()
    # Workers find transformers' `tests` before ours, and the hub is never asked.
    os.environ |= {"PYTHONPATH": f"{source}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(source), str(ROOT)]
    os.chdir(source)
    options = ["-q", "-n2", "--dist=worksteal", "--tb=short", "-W", "ignore", "--no-header"]
    options += ["-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={source}"]
    chosen = [f"{suite}::Test_{name}" for name in only] or [str(suite)]
    pytest.main([*options, *chosen], plugins=[outcomes])
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' conformance tests on every mixer")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="A checkout of transformers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="MIXER")
    options = parser.parse_args()
    from transformers import __version__ as version

    try:
        source = checkout(options.tests, version) if options.tests else fetch(version)
    except ValueError as error:
        parser.error(str(error))
    outcomes = run(source, options.only)
    table = outcomes.table()
    whole = (source / "tests" / "generation" / "test_utils.py").is_file()
    about = f"the tests in {source}" + ("" if whole else ", which lack those of generation")
    print(f"\ntransformers {version}, {about}: passed, failed, skipped")
    for mixer, (passed, failed, skipped) in table.items():
        print(f"{mixer:10} {passed:5} {failed:5} {skipped:5}")
    known = known_failures(PAGE.read_text(encoding="utf-8"), table)
    lines = differences(outcomes.failed, known, outcomes.passed)
    print(*(lines or [f"nothing differs from {PAGE.relative_to(ROOT)}"]), sep="\n")
    return int(bool(lines) or not table)


if __name__ == "__main__":
    sys.exit(main())
