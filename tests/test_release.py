"""A release: its changelog, the steps that make it, and pages that hold for every reader."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import statewright

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_changelog_begins_with_what_is_unreleased_and_says_nothing_twice() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)", text, re.M)
    assert versions[0] == "Unreleased" and len(set(versions)) == len(versions)
    assert statewright.__version__.partition(".dev")[0] in versions
    lines = [" ".join(x.split()) for x in re.split(r"^- ", text, flags=re.M)[1:]]
    assert len(lines) == len(set(lines))


def test_the_steps_of_a_release_are_a_script() -> None:
    text = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for target in re.findall(r"make ([\w-]+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    assert set(re.findall(r"[\w./-]+\.(?:md|toml|cff|py)\b", text)) <= {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_speak_of_what_a_reader_can_see(page: Path) -> None:
    """A load on the machine is "a shared machine"; whose load it was, no reader knows."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert not re.findall(r"\b(?:(?:an)?other jobs?|jobs beside|neighbours? noisy)\b", text)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)
