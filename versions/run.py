"""Run the tests that depend on other packages under the lowest and the newest versions of these.

python versions/run.py [lowest] [newest] [torch] [extras]

`pyproject.toml` alone says what is supported. Every environment lies in build/versions and holds
our wheel, installed as a user would: lowest pins each dependency to its lower bound, newest takes
what pip finds, both with the torch of constraints.txt; torch takes `TORCH` (gigabytes) and the
newest of the rest; extras installs every extra alone and runs what it is for. `passed.json` beside
this file records the versions under which everything passed. Exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent))
from extras import VERBS, WITHOUT, setup

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "versions"
PASSED = Path(__file__).with_name("passed.json")
TORCH = "2.14.1"
TESTS = (
    "laws generate hf keywords arguments contracts packing training_tools bounded bounded_generate "
    "check bridge state_file session cli fetch peft"
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


class Environment:
    """A fresh virtual environment; its packages come before those of the `bases`, these in order.

    So gigabytes of torch are installed once, and pip sees what the bases hold.
    """

    def __init__(self, name: str, *bases: Environment) -> None:
        self.home = HOME / name
        shutil.rmtree(self.home, ignore_errors=True)
        venv.create(self.home, with_pip=True, symlinks=True)
        self.python = self.home / "bin" / "python"
        (self.site,) = self.home.glob("lib/python*/site-packages")
        (self.site / "zz_bases.pth").write_text("".join(f"{base.site}\n" for base in bases))

    def install(self, *what: str) -> None:
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)

    def run(self, *command: str, cwd: Path = ROOT, quiet: bool = False, **variables: str) -> None:
        """Raises CalledProcessError if the command fails; quiet: with what it said."""
        # A venv's console scripts, and no packages of whoever calls us.
        path = f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        env.pop("PYTHONPATH", None)
        subprocess.run(
            [self.python, *command], check=True, cwd=cwd, env=env, capture_output=quiet, text=True
        )

    def versions(self) -> dict[str, str]:
        names = [r.name for r in dependencies()]
        code = "import json, sys; from importlib.metadata import version\n"
        code += "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
        ran = subprocess.run([self.python, "-c", code, *names], capture_output=True, check=True)
        return json.loads(ran.stdout)


def wheel() -> str:
    """Our wheel, built from this tree."""
    place = HOME / "wheel"
    shutil.rmtree(place, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", place, ROOT]
    subprocess.run(command, check=True)
    (found,) = place.glob("*.whl")
    return str(found)


def check_tests(environment: Environment) -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    environment.run("-m", "pytest", *options, *files, HF_HUB_OFFLINE="1")


def record(name: str, versions: dict[str, str]) -> None:
    known = json.loads(PASSED.read_text()) if PASSED.exists() else {}
    PASSED.write_text(json.dumps({**known, name: versions}, indent=2, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = ("lowest", "newest", "torch", "extras")
    parser.add_argument("kinds", nargs="*", choices=kinds, default=["lowest", "newest"])
    parser.add_argument("--extra", action="append", choices=list(VERBS), help="Only these extras.")
    chosen = parser.parse_args()
    ours, failed = wheel(), []
    base = Environment("base")
    base.install(tested_torch(), *TOOLS)
    for kind in chosen.kinds:
        try:
            if kind == "extras":
                failed += check_extras(base, ours, chosen.extra or list(VERBS))
                continue
            environment = Environment(kind, *([] if kind == "torch" else [base]))
            pins = {"lowest": lowest(), "newest": [], "torch": [f"torch=={TORCH}", *TOOLS]}[kind]
            keep = [] if kind == "torch" else [tested_torch()]
            environment.install(ours, *BESIDE, *pins, *keep)
            print(f"{kind}: {environment.versions()}", flush=True)
            check_tests(environment)
            record(kind, environment.versions())
        except subprocess.CalledProcessError as error:
            failed.append(f"{kind}: {' '.join(map(str, error.cmd[1:6]))} ... failed")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def check_extras(base: Environment, ours: str, names: list[str]) -> list[str]:
    """Each extra alone over an environment without any; one line per extra that fails."""
    failed = []
    bare = Environment("bare", base)
    bare.install(ours, tested_torch())
    work = HOME / "work"
    shutil.rmtree(work, ignore_errors=True)
    setup(bare, work)
    for name in names:
        failed += [f"extra {name}, absent: {said}" for said in refused(bare, name, work)]
        environment = Environment(f"extra-{name}", bare, base)
        try:
            environment.install(f"{ours}[{name}]", tested_torch())
            for command in VERBS[name]:
                words = [word.replace("{work}", str(work)) for word in command]
                environment.run(*words, cwd=work, **home(work))
            print(f"extra {name}: works alone", flush=True)
        except subprocess.CalledProcessError as error:
            failed.append(f"extra {name}: {' '.join(map(str, error.cmd[1:6]))} ... failed")
        shutil.rmtree(environment.home)
    return failed


def home(work: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "STATEWRIGHT_HOME": str(work)}


def refused(bare: Environment, name: str, work: Path) -> list[str]:
    """What a command says without its extra, if that is not a last line that names it."""
    if name not in WITHOUT:
        return []
    try:
        bare.run(*WITHOUT[name], cwd=work, quiet=True, **home(work))
        return ["no error"]
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1]
        named = last.startswith("statewright: ") and f"statewright[{name}]" in last
        return [] if named and "Traceback" not in error.stderr else [last]


if __name__ == "__main__":
    sys.exit(main())
