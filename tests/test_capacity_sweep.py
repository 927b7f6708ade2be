"""Cells side by side: the same results, whoever runs them, and a dead worker's cell by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from statewright.cells import Cell, read_cells, run_cells
from statewright.studies.sweep import CellsFailed, runner_of


def work(root: Path, key: str) -> dict:
    """Notes who ran what; some cells fail, and `once` only the first time."""
    tries = root / f"{key}-{os.getpid()}"
    tries.touch()
    if key == "raises":
        raise ValueError("seven is no size")
    if key == "slow":
        time.sleep(600)
    if key == "dies" or (key == "once" and len(list(root.glob("once-*"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"squared": len(key) ** 2, "by": os.getpid()}


def recipe(root: Path, keys: tuple[str, ...]) -> list[Cell]:
    return [Cell(key, partial(work, root, key)) for key in keys]


KEYS = ("once", "a", "raises", "bb", "dies", "ccc")


def check_failures(parallel: str, tmp_path: Path, path: Path) -> None:
    """Every cell that can have a result has one; the others are named."""
    make = partial(recipe, tmp_path, KEYS)
    with pytest.raises(CellsFailed) as failed:
        list(run_cells(make(), path, {"run": 1}, runner_of(parallel, make)))
    assert set(failed.value.why) == {"raises", "dies"}
    told = str(failed.value)
    assert "no result of 2 cell(s)" in told and "raises: ValueError: seven is no size" in told
    assert "dies: its" in told and "died twice" in told
    found = read_cells(path)
    assert {key: cell["squared"] for key, cell in found["cells"].items()} == {
        "once": 16, "a": 1, "bb": 4, "ccc": 9,
    }  # fmt: skip
    assert found["about"] == {"run": 1} and "seconds" in found["cells"]["a"]
    assert os.getpid() not in {cell["by"] for cell in found["cells"].values()}
    counts = {key: len(list(tmp_path.glob(f"{key}-*"))) for key in KEYS}
    assert counts == {"once": 2, "a": 1, "raises": 1, "bb": 1, "dies": 2, "ccc": 1}


def test_processes_share_cells_and_survive_each_other(tmp_path: Path) -> None:
    check_failures("2", tmp_path, tmp_path / "r.json")
    ended = CellsFailed({"dies": "x"})
    assert "SIGKILL" in _told(tmp_path) and ended.why == {"dies": "x"}
    make = partial(recipe, tmp_path, ("a", "d"))
    ran = dict(run_cells(make(), tmp_path / "r.json", {"run": 2}, runner_of("3", make)))
    assert list(ran) == ["d"], "what the file holds is not run again"


def test_who_stops_early_leaves_no_process(tmp_path: Path) -> None:
    make = partial(recipe, tmp_path, ("a", "slow", "bb"))
    running = run_cells(make(), tmp_path / "r.json", {}, runner_of("2", make))
    next(running)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    assert not multiprocessing.active_children()
    assert "slow" not in read_cells(tmp_path / "r.json")["cells"]


def _told(root: Path) -> str:
    """A cell that always dies, in more processes than there are cells."""
    make = partial(recipe, root, ("dies",))
    with pytest.raises(CellsFailed) as failed:
        list(run_cells(make(), root / "dead.json", {}, runner_of("4", make)))
    return str(failed.value)


def test_a_recipe_that_makes_other_cells_is_told(tmp_path: Path) -> None:
    cells = recipe(tmp_path, ("a",))
    with pytest.raises(CellsFailed, match="a: ValueError: the recipe makes no such cell"):
        list(run_cells(cells, tmp_path / "r.json", {}, runner_of("2", partial(recipe, *NONE))))


NONE = (Path(), ())


def test_what_parallel_may_be(monkeypatch) -> None:
    for wrong in ("0", "-1", "two", "", "2.0", "http://a"):
        with pytest.raises(ValueError, match="expected a number of processes, ray, or ray://"):
            runner_of(wrong, list)
    monkeypatch.setitem(sys.modules, "ray", None)
    for way in ("ray", "ray://head:10001"):
        with pytest.raises(ValueError, match=r"pip install 'statewright\[sweep\]'"):
            runner_of(way, list)


def test_ray(tmp_path: Path) -> None:
    """Two workers of a Ray of this machine: the same failures, told the same way."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    # Ray's workers do not look for modules among the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        check_failures("ray", tmp_path, tmp_path / "r.json")
        assert ray.is_initialized(), "who was connected stays connected"
    finally:
        ray.shutdown()


def grid(tmp_path: Path, name: str, *more: str) -> dict:
    from statewright.bench.protocol import using_threads
    from statewright.cli import main

    small = ["--hidden-size", "16", "--head-dim", "8", "--num-layers", "1", "--num-steps", "2"]
    sizes = ["--size", "2", "--size", "4", "--system", "low-decay", "--length", "128"]
    keys = ["--recall", "--tokens-per-step", "256", "--longest-recall", "256", "--num-eval", "2"]
    keys += ["--passing-steps", "2", "--passing-segments", "2", "--easy-steps", "1"]
    output = str(tmp_path / name)
    # As many threads as a worker has: sums over threads may differ in their last bit.
    with using_threads(1):
        assert main(["capacity", *keys, *small, *sizes, "--output", output, *more]) == 0
    cells = json.loads((tmp_path / name).read_text())["cells"]
    for cell in cells.values():
        del cell["seconds"], cell["trained_seconds"]
    return cells


@pytest.mark.slow
def test_the_command_line_side_by_side(tmp_path: Path, capsys) -> None:
    alone, together = grid(tmp_path, "1.json"), grid(tmp_path, "2.json", "--parallel", "2")
    assert len(alone) == 2 and alone == together
    assert "T_passed" in capsys.readouterr().out
    from statewright.cli import main

    copy = ["study", "selective-copy", "--output", str(tmp_path / "s.json"), "--parallel", "2"]
    copy += ["--num-steps", "2", "--num-eval", "8", "--hidden-size", "8", "--length", "8"]
    assert main([*copy, "--tokens", "2", "--system", "mingru/1", "--system", "gru/1"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert set(found["cells"]) == {"mingru/1/seed0", "gru/1/seed0"}
    assert main(["capacity", "--recall", "--output", "x.json", "--parallel", "many"]) == 1
    error = capsys.readouterr().err
    assert "--parallel='many', expected" in error and error.count("\n") == 1
