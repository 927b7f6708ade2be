"""What a newcomer does: the README's lines, in their order, in a new environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_MINUTES = 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_readme_from_a_clone_to_a_page(tmp_path: Path) -> None:
    """Nothing but the README is read; all of it takes less than ten minutes."""
    clone, empty = tmp_path / "clone", tmp_path / "empty"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    empty.mkdir()
    text = (clone / "README.md").read_text()
    install, use = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    bound = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    (empty / "bound.py").write_text(bound)
    script = f"set -e\ncd {clone}\n{install}\ncd {empty}\n{use}\npython bound.py\n"
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE", "http_proxy", "https_proxy")
    environment = {k: os.environ[k] for k in os.environ if k in kept or k.startswith("PIP_")}
    environment |= {"STATEWRIGHT_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).resolve().parent}:{environment['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_MINUTES * 60,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = ran.stdout + ran.stderr
    assert "collapse" in said and "continuing after 192,620 tokens" in said
    assert (
        "statewindow" in (empty / "fixed/config.json").read_text()
        or "forgetmore" in (empty / "fixed/config.json").read_text()
    )
    page = (empty / "eval.html").read_text()
    assert "tova:budget=32" in page
    browser = shutil.which("chromium")
    if browser:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        opened = subprocess.run(
            [browser, *options, f"file://{empty}/eval.html"], capture_output=True, text=True
        )
        assert "tova:budget=32" in opened.stdout
