"""The pages of the docs site: a page per verb, every command known, the first one shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from statewright.cli import cli, types

DOCS = Path(__file__).parents[1] / "docs"
VERBS = sorted((DOCS / "verbs").glob("*.md"))
PAGES = [DOCS / "start.md", *sorted((DOCS / "tutorials").glob("*.md")), *VERBS]
KINDS = ("bash", "sh")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    """A page's blocks and their kinds: bash is run, text is what it prints, sh is only parsed."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[list[str]]:
    """The words of every command in a block."""
    for line in block.splitlines():
        if line.strip():
            yield shlex.split(line, comments=True)


def parsed(words: list[str]) -> None:
    """Parse with click, down to the last subcommand, without running; raises for a mistake."""
    command, name, rest = cli, "statewright", words
    parent = None
    while True:
        context = command.make_context(name, list(rest), parent=parent, resilient_parsing=False)
        if not isinstance(command, click.Group):
            return
        left = [*context._protected_args, *context.args]
        if not left and command.invoke_without_command:
            return
        name, command, rest = command.resolve_command(context, left)
        parent = context


def test_every_verb_has_a_page_and_the_site_knows_it() -> None:
    site = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.stem for page in VERBS} == set(cli.commands)
    assert all(f": verbs/{verb}.md\n" in site for verb in cli.commands)
    known = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", site, re.M)) == known


def take_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages' files and models are not here; that they are called for is another test."""
    for kind in (types.Text, types.Model, types.Tokenizer):
        monkeypatch.setattr(kind, "convert", lambda self, value, param, ctx: value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_known_to_the_command_line(page, monkeypatch) -> None:
    take_every_path(monkeypatch)
    found = [words for kind, block in blocks(page) if kind in KINDS for words in commands(block)]
    own = [words[1:] for words in found if words[0] == "statewright"]
    assert own, "a page without an example"
    assert page not in VERBS or page.stem in {words[0] for words in own}
    for words in own:
        parsed(words[: words.index(">")] if ">" in words else words)
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / picture).stat().st_size < 150_000


# lm-eval needs a package and a model that are fetched.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "lm-eval"], ids=lambda page: page.stem
)
def test_the_first_command_shows_what_it_prints(page) -> None:
    kinds = [kind for kind, _ in blocks(page)]
    first = kinds.index("bash")
    assert "sh" not in kinds[:first]
    assert kinds[first + 1] == "text"


@pytest.mark.parametrize("words", ["eval m --taks x", "resize m --key", "study nothing", "lost"])
def test_a_mistake_would_be_found(words) -> None:
    with pytest.raises(click.UsageError):
        parsed(words.split())


def rows(page: Path) -> list[list[str]]:
    """The cells of every row of a page's tables, heads and rules left out."""
    lines = [x for x in page.read_text(encoding="utf-8").splitlines() if x.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_reproduced_numbers_are_those_of_the_pages(monkeypatch) -> None:
    """Ours: what was not run says so, and every decimal stands in the page of its results."""
    take_every_path(monkeypatch)
    names = ("bounded", "capacity", "collapse", "compare", "minimal", "rl", "statex", "log")
    known = "\n".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in names)
    found = [row for row in rows(DOCS / "reproduce.md") if row[0] != "table"]
    assert len(found) > 40
    for table, _, ours, holds, command in found:
        assert ours, table
        assert command or "no data" in ours, table
        assert holds or ours.startswith("not run"), table
        for number in re.findall(r"\d+\.\d+", ours):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", known), (table, number)
        for words in re.findall(r"`(statewright [^`]+)`", command):
            parsed(shlex.split(words)[1:])
