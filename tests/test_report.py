"""The page of a diagnosis: whole, readable without seeing, the same for the same numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from statewright.cli.diagnose import as_record
from statewright.diagnosis import diagnose
from statewright.diagnosis.controls import Control, untrained
from statewright.models.tokenizers import byte_tokenizer
from statewright.report.diagnosis import page
from statewright.report.svg import Axis, Chart, count, plain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
_VOID = {"meta", "link", "line", "rect", "circle", "polyline", "br"}


@pytest.fixture(scope="module")
def record() -> dict:
    torch.manual_seed(0)
    model = untrained(Control(hidden_size=32, state_size=8, head_dim=16))
    ids = torch.randint(256, (1, 400), generator=torch.Generator().manual_seed(0))
    runs = [
        diagnose(model, ids, 16, byte_tokenizer(), ("text", "newlines"), policy, "a<b&c")
        for policy in (None, "forgetmore:decay=0.9")
    ]
    return json.loads(json.dumps(as_record(runs, {"text": "book.txt", "rows": 1})))


class Reader(HTMLParser):
    """Collects tags and ids, and insists that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.labels = [], [], [], []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.labels += named.get("aria-labelledby", "").split()
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole(record) -> None:
    text = page(record)
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and len(set(reader.ids)) == len(reader.ids)
    assert len(reader.labels) == 2 * text.count('role="img"') > 10
    assert set(reader.labels) == set(reader.ids)
    assert "script" not in reader.tags and "http" not in text and "url(" not in text
    assert "a&lt;b&amp;c" in text and "a<b" not in text
    assert "under forgetmore:decay=0.9" in text and 'lang="en"' in text and "viewport" in text
    assert "nan" not in text.replace("finance", "") and "None" not in text


def test_the_same_numbers_make_the_same_bytes(record) -> None:
    again = json.loads(json.dumps(record, sort_keys=True))
    assert page(record) == page(again)


def test_what_is_drawn_is_what_was_measured(record) -> None:
    """The lowest and the highest loss lie where the axis says."""
    chart = Chart("t", "d", Axis("x", 1, 1024, log=True, binary=True), Axis("y", 0.0, 4.0))
    assert chart.at(1, 4.0) == (46, 10) and chart.at(1024, 0.0) == (388, 210)
    assert chart.at(32, 2.0) == ((46 + 388) / 2, 110)
    chart.line([(1, 4.0), (32, float("nan")), (1024, 0.0)], "before")
    assert 'points="46.0,10.0 388.0,210.0"' in chart.render("c")
    inside = record["runs"][0]["text"]["reading"]["in_window"]
    assert f"<b>{inside:.2f}</b>" in page(record)


def test_ticks_and_labels() -> None:
    assert [t for _, t in Axis("x", 1, 2**20, log=True, binary=True).ticks()] == [
        "1", "16", "256", "4k", "64k", "1M",
    ]  # fmt: skip
    assert [t for _, t in Axis("y", 0.0, 1.0).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert len(Axis("y", 2.0, 2.5, log=True).ticks()) > 1
    assert (plain(2e6), plain(0.25), count(65536), count(100)) == ("2e6", "0.25", "64k", "100")


def test_other_records_are_refused() -> None:
    with pytest.raises(ValueError, match="format 1"):
        page({"format": 2, "runs": [{}]})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it_without_a_word(record, tmp_path) -> None:
    """A real browser: nothing on its console, ink on the screenshot."""
    (tmp_path / "page.html").write_text(page(record), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    picture = f"--screenshot={tmp_path / 'page.png'}"
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *flags, "--window-size=400,900", picture, address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    # A blank page of this size is a few kilobytes.
    assert (tmp_path / "page.png").stat().st_size > 20_000
