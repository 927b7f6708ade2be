"""The X-ray page in a real browser: phone, desktop, without scripts, by keyboard and by pointer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from test_xray import EVIL, RESULTS, evaluated, traced  # noqa: F401

from statewright.report.xray import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
# What a person would do, in three frames: a phone, a desk, and a desk without scripts.
_PROBE = r"""
addEventListener('load', () => setTimeout(() => {
  const [phone, desk, bare] = [...document.querySelectorAll('iframe')].map(f => f.contentDocument);
  const wide = d => [d.documentElement.scrollWidth, d.documentElement.clientWidth];
  const key = (e, key) => e.dispatchEvent(new desk.defaultView.KeyboardEvent('keydown',
    { key, bubbles: true, cancelable: true }));
  const figure = desk.querySelector('figure.read'), plot = figure.querySelector('.plot');
  plot.focus();
  const focused = desk.activeElement === plot;
  key(plot, 'ArrowRight'); const first = figure.querySelector('[role=status]').textContent;
  key(plot, 'End'); const last = figure.querySelector('[role=status]').textContent;
  key(plot, 'Escape'); const hidden = figure.querySelector('.tip').hidden;
  const box = figure.querySelector('svg').getBoundingClientRect();
  figure.querySelector('svg').dispatchEvent(new desk.defaultView.PointerEvent('pointermove',
    { clientX: box.left + box.width * .13, clientY: box.top + 20, bubbles: true }));
  const hovered = figure.querySelector('.tip').textContent;
  const held = desk.querySelector('.held'), spans = [...held.querySelectorAll('.text span')];
  const end = spans.map(s => s.className).join(' ');
  const slider = held.querySelector('input'); slider.value = 2;
  slider.dispatchEvent(new desk.defaultView.Event('input'));
  const early = spans.map(s => s.className).join(' ');
  key(held.querySelector('.text'), 'ArrowRight');
  const named = held.querySelector('.named').textContent;
  const found = { phone: wide(phone), desk: wide(desk), focused, first, last, hidden, hovered,
    end, early, named, controls: getComputedStyle(held.querySelector('.controls')).display,
    bare: [getComputedStyle(bare.querySelector('.controls')).display,
      bare.querySelector('table').offsetHeight, bare.querySelectorAll('.plot[tabindex]').length,
      (bare.querySelector('details').open = true,
        bare.querySelector('details table').offsetHeight)],
    over: [...phone.querySelectorAll('body *')].filter(e => !e.closest('table, svg, .unseen')
      && e.getBoundingClientRect().right > 376).map(e => e.outerHTML.slice(0, 160)),
    small: [...phone.querySelectorAll('svg text')].length };
  const out = document.createElement('pre'); out.id = 'found';
  out.textContent = JSON.stringify(found); document.body.append(out);
}, 300));
"""


def browse(text: str, folder: Path) -> tuple[dict, str]:
    """What the probe found, and what the browser said."""
    frames = "".join(
        f'<iframe {sandbox} style="border:0;width:{width}px;height:3000px" '
        f'srcdoc="{escape(text)}"></iframe>'
        for width, sandbox in ((375, ""), (1000, ""), (1000, 'sandbox="allow-same-origin"'))
    )
    shell = f"<!DOCTYPE html><meta charset=utf-8><script>{_PROBE}</script>{frames}"
    (folder / "shell.html").write_text(shell, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    flags += ["--hide-scrollbars"]
    address = (folder / "shell.html").as_uri()
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--window-size=1100,900", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The frame that may run no scripts says so, once for each.
    return json.loads(unescape(found[1])), [x for x in said if "Blocked script execution" not in x]


def test_a_browser_shows_and_reads_it_without_a_word(traced, tmp_path) -> None:  # noqa: F811
    books = json.loads((RESULTS / "bounded_books.json").read_text())
    files = [
        ("eval.json", evaluated(EVIL + "x" * 150)),
        ("trace.json", traced),
        ("books.json", books),
    ]
    curves = {"octaves": [[128, 2.0], [256, 3.0]]}
    long = {f"{'x' * 90}/{i}": curves for i in range(20)}
    files.append(("long.json", {"cells": long}))
    found, said = browse(page(files, EVIL), tmp_path)
    assert said == []
    assert found["over"] == []
    assert found["phone"] == [375, 375] and found["desk"] == [1000, 1000]
    assert found["focused"] and found["hidden"] and found["small"] > 50
    # The first chart is accuracy over lengths: both ends are read out, for every policy.
    assert found["first"].startswith("tokens 256; none: 0.75 [0.1, 0.9]; tova:budget=32: 0.5")
    assert found["last"].startswith("tokens 512; none: 0.75")
    assert found["hovered"].startswith("tokens 256")
    held = found["end"].split()
    assert held[:2] == ["q5", "q5"] and held[2:34] == ["q0"] * 32 and held[34:] == ["q5"] * 6
    # After 12 tokens the window holds the sinks and the last six.
    assert found["early"].split() == ["q5"] * 2 + ["q0"] * 4 + ["q5"] * 6 + ["later"] * 28
    assert found["named"].startswith(json.dumps(EVIL)) and "2 of 2" not in found["named"]
    assert "1 of 1 lists hold it" in found["named"] and found["controls"] == "flex"
    assert found["bare"][0] == "none" and found["bare"][1] > 50 and found["bare"][3] > 20
    assert found["bare"][2] == 0
