"""The benchmark's own honesty: the gate, the floor, the table. Speeds are not asserted here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from statewright.bench import bounded, decode, layers, scans, table
from statewright.bench.protocol import Case, as_json, environment, measure
from statewright.cli import main
from statewright.cli.bench import SUITES
from statewright.ops import native


def test_a_wrong_method_is_not_timed() -> None:
    ran = []
    case = Case("c", "floor", {"floor": lambda: ran.append(1)}, {"x": 1e-3}, {"x": 1e-6})
    with pytest.raises(RuntimeError, match=r"x has error 0\.001, allowed 1e-06"):
        measure(case, threads=1)
    assert not ran


def test_not_a_number_does_not_pass_the_gate() -> None:
    with pytest.raises(RuntimeError, match="nan"):
        Case("c", "floor", {}, {"x": float("nan")}, {"x": 1.0}).check()


def test_methods_take_turns_and_threads_are_restored() -> None:
    order, before = [], torch.get_num_threads()
    methods = {name: lambda name=name: order.append(name) for name in "ab"}
    rows = measure(Case("c", "a", methods), threads=1, seconds=0.0)
    assert order == ["a", "b"] * (len(order) // 2) and len(order) == 8
    assert torch.get_num_threads() == before
    assert [r.to_floor for r in rows if r.method == "a"] == [1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: scans.forward(2, 40, 8),
        lambda: scans.backward(2, 40, 8),
        lambda: layers.layer("mingru", 2, 33, 16),
        lambda: layers.layer("minlstm", 2, 33, 16),
        lambda: decode.step("mingru", 16),
        lambda: decode.language_model(1, 8),
        lambda: bounded.decoding(1, budget=8, seen=40, tokens=2),
    ],
)
def test_every_case_passes_its_gate_and_runs(make) -> None:
    case = make()
    case.check()
    assert case.floor in case.methods
    if native.available() and "scan" in case.name:
        assert "native" in case.tolerance
    for method in case.methods.values():
        method()


PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"


def place(suite: str) -> str:
    return f"before\n<!-- bench: {suite} -->\nold\n<!-- bench end -->\nafter\n"


def saved(case: Case, path: Path) -> list[list[str]]:
    """The rows of the table of one case, as cells."""
    found = as_json(measure(case, threads=1, seconds=0.0), environment("statewright bench"))
    path.write_text(json.dumps(found))
    lines = [line for line in table.markdown(path).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]]


def test_tables_are_written_into_their_places(tmp_path: Path) -> None:
    rows = measure(scans.forward(1, 16, 4), threads=1, seconds=0.0)
    found = as_json(rows, environment("statewright bench --suite scans"))
    (tmp_path / "scans.json").write_text(json.dumps(found))
    page = tmp_path / "page.md"
    page.write_text(place("scans") + place("layers"))
    assert table.write_tables(page, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(place("layers"))
    assert text.count("old") == 1 and text.count("<!-- bench end -->") == 2
    assert "vector_scan forward (1, 16, 4)" in text and "statewright bench --suite scans" in text
    assert not table.write_tables(page, tmp_path)


def test_a_page_without_a_place_is_refused_before_anything_is_measured(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(place("scans"))
    options = ["bench", "--suite", "layers", "--page", str(page)]
    assert main(options) != 0
    assert "--output-dir" in capsys.readouterr().err
    assert main([*options, "--output-dir", str(tmp_path / "out")]) != 0
    error = capsys.readouterr().err
    assert "no place for the suite layers" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_floor_that_is_ours_shows_no_ratio(tmp_path: Path) -> None:
    def nothing() -> None:
        pass

    methods = {"torch": nothing, "native": nothing, "peer": nothing}
    ((case, _, floor, ratio, peers),) = saved(Case("c", "native", methods), tmp_path / "own.json")
    assert (case, floor, ratio) == ("c", "-", "-") and "peer" in peers and "torch" in peers
    methods = {"floor: sum": nothing, "ours": nothing, "ours, half": nothing, "peer": nothing}
    ((*_, floor, ratio, peers),) = saved(Case("c", "floor: sum", methods), tmp_path / "sum.json")
    assert floor == "sum" and re.fullmatch(r"\d+\.\d\d, half \d+\.\d\d", ratio)
    assert peers.startswith("peer ") and "half" not in peers


def test_a_table_without_a_peer(tmp_path: Path) -> None:
    case = Case("two ways", "floor: plain", {"floor: plain": lambda: None, "other": lambda: None})
    ((*_, floor, ratio, peers),) = saved(case, tmp_path / "ways.json")
    assert floor == "plain" and re.fullmatch(r"other \d+\.\d\d", ratio) and peers == ""


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    """The committed tables, and every decimal of the text around them."""
    copy = tmp_path / "speed.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert not table.write_tables(copy, RESULTS), "run make docs"
    text = copy.read_text(encoding="utf-8")
    tables = "".join(re.findall(r"<!-- bench: .*?<!-- bench end -->", text, re.S))
    log = (PAGE.parent / "log.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- bench: .*?<!-- bench end -->", "", text, flags=re.S)
    own = float(re.search(r"ours \| ([\d.]+) \|", tables)[1])
    theirs = float(re.search(r"transformers \| ([\d.]+) \|", tables)[1])
    known = f"{tables} {log} {own / theirs:.2f}"
    numbers = re.findall(r"\d+\.\d+", prose)
    assert len(numbers) > 30
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", known), number


@pytest.mark.parametrize("suite", sorted(set(SUITES) - {"perplexity"}))
def test_every_suite_is_in_the_page(suite: str) -> None:
    table.check_places(PAGE, [suite])
    assert f"`benchmarks/results/{suite}.json`" in PAGE.read_text(encoding="utf-8")
