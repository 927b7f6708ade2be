"""The benchmark's own honesty: the gate, the floor, the table. Speeds are not asserted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statewright.bench import bounded, decode, layers, scans, table
from statewright.bench.protocol import Case, as_json, environment, measure
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


def test_readme_table(tmp_path: Path) -> None:
    rows = measure(scans.forward(1, 16, 4), threads=1, seconds=0.0)
    found = as_json(rows, environment("statewright bench --suite scans"))
    (tmp_path / "scans.json").write_text(json.dumps(found))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "vector_scan forward (1, 16, 4)" in text and "statewright bench --suite scans" in text
    assert not table.write_readme(readme, tmp_path)


def test_a_table_without_a_peer(tmp_path: Path) -> None:
    case = Case("two ways", "floor: plain", {"floor: plain": lambda: None, "other": lambda: None})
    found = as_json(measure(case, threads=1, seconds=0.0), environment("statewright bench"))
    (tmp_path / "ways.json").write_text(json.dumps(found))
    (line,) = [x for x in table.markdown(tmp_path).splitlines() if x.startswith("| two ways")]
    assert line == f"| two ways | 1 | other {found['rows'][1]['to_floor']:.2f} | |"
