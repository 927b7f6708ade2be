"""Virtual environments that share what is large, and the wheel that is installed in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "versions"
PACKAGE = ("statewright", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TREE = (*PACKAGE, "tests", "versions", "docs", "mkdocs.yml", "constraints.txt")


def digest(*names: str) -> str:
    """A digest of these files and folders; what is compiled and `passed.json` do not count."""
    files: list[Path] = []
    for name in names:
        files += [p for p in (ROOT / name, *(ROOT / name).rglob("*")) if p.is_file()]
    found = hashlib.sha256()
    for path in sorted(files):
        if path.suffix not in (".pyc", ".so") and path.name != "passed.json":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return found.hexdigest()


class Environment:
    """A fresh virtual environment; its packages come before those of the `bases`, these in order.

    So gigabytes of torch are installed once, and pip sees what the bases hold. With `keep` it is
    taken as it lies there if the same was installed in it and the installation ended.
    """

    def __init__(self, name: str, *bases: Environment, keep: tuple[str, ...] = ()) -> None:
        self.home = HOME / name
        self.python = self.home / "bin" / "python"
        installed, wanted = self.home / "installed.json", json.dumps(keep)
        if not (keep and installed.is_file() and installed.read_text() == wanted):
            shutil.rmtree(self.home, ignore_errors=True)
            venv.create(self.home, with_pip=True, symlinks=True)
            (self.site,) = self.home.glob("lib/python*/site-packages")
            (self.site / "zz_bases.pth").write_text("".join(f"{base.site}\n" for base in bases))
            if keep:
                self.install(*keep)
                installed.write_text(wanted)
        (self.site,) = self.home.glob("lib/python*/site-packages")

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

    def versions(self, *names: str) -> dict[str, str]:
        code = "import json, sys; from importlib.metadata import version\n"
        code += "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
        ran = subprocess.run([self.python, "-c", code, *names], capture_output=True, check=True)
        return json.loads(ran.stdout)


def wheel() -> str:
    """Our wheel, built once from the same package."""
    place = HOME / "wheel" / digest(*PACKAGE)[:16]
    if not list(place.glob("*.whl")):
        # setuptools would pack modules that lie there from an older tree.
        for stale in (place.parent, *(ROOT / "build").glob("lib*")):
            shutil.rmtree(stale, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", place, ROOT]
        subprocess.run(command, check=True)
    (found,) = place.glob("*.whl")
    return str(found)
