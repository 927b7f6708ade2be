"""Run the tests that depend on other packages under the lowest and the newest versions of these.

python versions/run.py [lowest] [newest] [torch] [extras] [--extra NAME]

`pyproject.toml` alone says what is supported. Every environment lies in build/versions and holds
our wheel, installed as a user would: lowest pins each dependency to its lower bound, newest takes
what pip finds, both with the torch of constraints.txt; torch takes `TORCH` (gigabytes) and the
newest of the rest; extras installs every extra alone and runs what it is for. `passed.json` beside
this file records the versions under which everything passed. Exits with 1 if anything fails.

A run that was stopped, or of which a part failed, goes on where it was if nothing that it depends
on has changed.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
from environment import HOME, PACKAGE, ROOT, TREE, Environment, digest, wheel
from extras import VERBS, check_extra, setup

PASSED = Path(__file__).with_name("passed.json")
TORCH = "2.14.1"
TESTS = (
    "laws generate hf keywords arguments contracts packing positions training_tools compile "
    "bounded bounded_generate bounded_positions bounded_threads caches check bridge state_file "
    "session cli fetch peft quantised"
).split()
TOOLS = ("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6")
# Extras of the tests above.
BESIDE = ("accelerate>=1.1", "peft>=0.21")


def dependencies() -> list[Requirement]:
    """What pyproject requires, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lower_bound(requirement: Requirement) -> str:
    """Its `>=` version; ValueError without one."""
    found = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    if len(found) != 1:
        raise ValueError(f"pyproject.toml: {requirement} has no lower bound, expected one '>='")
    return found[0]


def lowest() -> list[str]:
    """A pin of every dependency to its lower bound; torch is that of constraints.txt."""
    return [f"{r.name}=={lower_bound(r)}" for r in dependencies() if r.name != "torch"]


def tested_torch() -> str:
    """The pin of torch in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==\S+", text, re.M)[0]


@functools.cache
def base(torch: str) -> Environment:
    """torch and what runs the tests."""
    return Environment(f"base-{torch.partition('==')[2]}", keep=(torch, *TOOLS))


@functools.cache
def bare(ours: str) -> Environment:
    """Our wheel without any extra."""
    return Environment("bare", base(tested_torch()), keep=(ours, tested_torch()))


def check_versions(kind: str, ours: str) -> None:
    """Install what `kind` says, run the tests there, record the versions if they pass."""
    torch = f"torch=={TORCH}" if kind == "torch" else tested_torch()
    environment = Environment(kind, base(torch))
    environment.install(ours, *BESIDE, torch, *(lowest() if kind == "lowest" else []))
    versions = environment.versions(*(r.name for r in dependencies()))
    print(f"{kind}: {versions}", flush=True)
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    # The wheel is what is tested, not the tree that the tests lie in.
    environment.run(*("-m", "pytest", *options, *files), HF_HUB_OFFLINE="1", PYTHONSAFEPATH="1")
    known = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    PASSED.write_text(json.dumps({**known, kind: versions}, indent=2, sort_keys=True) + "\n")


def check_one_extra(name: str, ours: str) -> None:
    environment, ready = bare(ours), HOME / "ready" / digest(*PACKAGE, "versions")[:16]
    if not ready.is_dir():
        shutil.rmtree(ready.parent, ignore_errors=True)
        setup(environment, ready.with_suffix(".part"))
        ready.with_suffix(".part").rename(ready)
    check_extra(name, ours, tested_torch(), ready, environment, base(tested_torch()))


class Progress:
    """What has passed of a run that did not end well, as build/versions/progress.json."""

    def __init__(self, tree: str, path: Path = HOME / "progress.json") -> None:
        self.path, self.tree, self.seconds = path, tree, {}
        if path.is_file():
            known = json.loads(path.read_text())
            self.seconds = known["seconds"] if known["tree"] == tree else {}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"tree": self.tree, "seconds": self.seconds}))
        part.replace(self.path)

    def run(self, steps: dict[str, Callable[[], None]]) -> list[str]:
        """Every step that has not passed; a line for each that fails."""
        failed = []
        for number, (name, step) in enumerate(steps.items(), 1):
            head = f"[{number}/{len(steps)}] {name}"
            if name in self.seconds:
                print(f"{head}: passed before, in {self.seconds[name]:.0f} s", flush=True)
                continue
            print(f"{head} ...", flush=True)
            start = time.monotonic()
            try:
                step()
            except subprocess.CalledProcessError as error:
                failed.append(f"{name}: {' '.join(map(str, error.cmd[1:6]))} ... failed")
            except ValueError as error:
                failed.append(f"{name}: {error}")
            else:
                self.seconds[name] = time.monotonic() - start
                self._write()
            ended = "failed" if name not in self.seconds else "passed"
            print(f"{head}: {ended} after {time.monotonic() - start:.0f} s", flush=True)
        if not failed:
            self.seconds = {n: s for n, s in self.seconds.items() if n not in steps}
            self._write()
        return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = ("lowest", "newest", "torch", "extras")
    parser.add_argument("kinds", nargs="*", choices=kinds, default=["lowest", "newest"])
    parser.add_argument("--extra", action="append", choices=list(VERBS), help="Only these extras.")
    chosen = parser.parse_args()
    ours, steps = wheel(), {}
    for kind in chosen.kinds:
        if kind == "extras":
            for name in chosen.extra or VERBS:
                steps[f"extra {name}"] = functools.partial(check_one_extra, name, ours)
        else:
            steps[kind] = functools.partial(check_versions, kind, ours)
    try:
        failed = Progress(digest(*TREE)).run(steps)
    except KeyboardInterrupt:
        failed = ["stopped; the same command goes on from here"]
    print(*failed, sep="\n", end="\n" * bool(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
