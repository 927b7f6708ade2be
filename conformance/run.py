"""Run transformers' conformance mixins on every mixer and compare with docs/conformance.md.

python conformance/run.py [--source DIR] [--only MIXER ...]

The tests of the installed transformers version are fetched once into build/conformance: with git
from the tag, or else from PyPI's source distribution, which lacks the generation tests. Exits
with 1 if a test fails that the page does not list, or one that it lists passes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"
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
    """The directory that holds transformers' `tests` of that version."""
    home = ROOT / "build" / "conformance" / f"transformers-{version}"
    if (home / "tests").is_dir():
        return home
    part = home.with_suffix(".part") / home.name
    shutil.rmtree(part.parent, ignore_errors=True)
    part.parent.mkdir(parents=True)
    clone = ["git", "clone", "--quiet", "--depth=1", "--filter=blob:none", "--sparse"]
    try:
        subprocess.run([*clone, f"--branch=v{version}", REPOSITORY, part], check=True)
        subprocess.run(["git", "-C", part, "sparse-checkout", "set", "tests"], check=True)
    except (OSError, subprocess.CalledProcessError):
        print(f"{REPOSITORY} cannot be cloned; PyPI's source holds no generation tests")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        where = ["--dest", part.parent, f"transformers=={version}"]
        subprocess.run([*pip, *where], check=True)
        with tarfile.open(part.with_name(f"{part.name}.tar.gz")) as archive:
            inside = [m for m in archive if m.name.startswith(f"{part.name}/tests/")]
            archive.extractall(part.parent, inside, filter="data")
    part.replace(home)
    shutil.rmtree(part.parent)
    return home


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
    parser.add_argument(
        "--source", type=Path, help="a checkout of transformers, or its `tests`' home"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="MIXER")
    options = parser.parse_args()
    import transformers

    source = options.source or fetch(transformers.__version__)
    if not (source / "tests" / "test_modeling_common.py").is_file():
        parser.error(f"--source {source}: no tests/test_modeling_common.py there")
    outcomes = run(source.resolve(), options.only)
    table = outcomes.table()
    print(f"\ntransformers {transformers.__version__}: passed, failed, skipped")
    for mixer, (passed, failed, skipped) in table.items():
        print(f"{mixer:10} {passed:5} {failed:5} {skipped:5}")
    known = known_failures(PAGE.read_text(encoding="utf-8"), table)
    lines = differences(outcomes.failed, known, outcomes.passed)
    print(*(lines or [f"nothing differs from {PAGE.relative_to(ROOT)}"]), sep="\n")
    return int(bool(lines) or not table)


if __name__ == "__main__":
    sys.exit(main())
