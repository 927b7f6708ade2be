"""Recall at equal bytes of state: of checkpoints, and of models trained for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from statewright.cli import main
from statewright.evaluation import Plan, byte_curves, footprint, run_bytes
from statewright.evaluation import grid as grid_module
from statewright.evaluation.equal_bytes import candidate_of
from statewright.models import StatewrightConfig, StatewrightForCausalLM
from statewright.models.tokenizers import byte_tokenizer
from statewright.studies import equal_bytes, figures
from statewright.studies.equal_bytes_model import NAMES, Reached, build, config_of, solve
from statewright.studies.equal_bytes_settings import EqualBytesSettings
from statewright.studies.equal_bytes_table import curves, points_of, table
from statewright.studies.experiment import Place, about

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
SIZES = (560, 2048, 4096, 16384)
TASK = "mqar:pairs=4:length=64"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).eval()


def own(mixer: str) -> StatewrightForCausalLM:
    torch.manual_seed(0)
    config = StatewrightConfig(hidden_size=16, num_hidden_layers=2, mixer=mixer, vocab_size=257)
    return StatewrightForCausalLM(config).eval()


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


MODELS = {
    "llama": llama,
    "mamba": mamba,
    "attention": lambda: own("attention:num_heads=2"),
    "mamba2": lambda: own("mamba2:state_size=8:head_dim=16"),
    "gru": lambda: own("gru"),
}


def run(plan: Plan, path: Path | None = None) -> dict[str, dict]:
    return dict(run_bytes(plan, lambda name: (MODELS[name](), TOKENIZER), path, "the command"))


def plan_of(*models: str, **changes) -> Plan:
    return dataclasses.replace(Plan(models, (TASK,), num_samples=4, sizes=SIZES), **changes)


def test_what_a_state_holds_is_measured() -> None:
    per_token = 2 * 2 * 8 * 4  # layers x (k, v) x head size x float32
    found = footprint(llama())
    assert (found.fixed, found.per_token) == (0, per_token)
    for name in ("mamba2", "gru"):
        model = MODELS[name]()
        found = footprint(model)
        assert (found.fixed, found.per_token) == (model.init_state(1).nbytes, 0)
    model = MODELS["attention"]()
    found = footprint(model)
    assert found.fixed == model.init_state(1).nbytes > 2 * 3 * 16 * 4
    assert found.per_token == 2 * 2 * (2 * 8 * 4 + 8)


def test_policies_stand_at_the_bytes_and_never_above() -> None:
    for name in ("llama", "attention"):
        found = run(plan_of(name))
        results = [r for r in found.values() if "unreachable" not in r]
        assert results[0]["policy"] == "none" and results[0]["target"] is None
        full = results[0]["cost"]["state_bytes"]
        for result in results[1:]:
            size, target = result["cost"]["state_bytes"], result["target"]
            assert target in SIZES and size <= target
            slot = 2 * 2 * (2 * 8 * 4 + 8 + 4)
            assert size > target - slot or target > full
            assert result["against_none"] is not None
        names = {candidate_of(r["model"], r["policy"]) for r in found.values()}
        wanted = ("none", "window", "window:sinks=4", "h2o", "tova")
        assert names == {f"{name} {policy}" for policy in wanted}
        missing = [r for r in found.values() if "unreachable" in r]
        every = {(p, s) for p in wanted[1:] for s in SIZES}
        there = {(candidate_of("", r["policy"]).strip(), r["target"]) for r in results[1:]}
        assert there | {(r["policy"], r["target"]) for r in missing} == every
        assert all("expected at least" in r["unreachable"] for r in missing)
    assert {(r["policy"], r["target"]) for r in missing} >= {("window", 560)}


def test_models_of_one_size_are_placed_grown_or_marked() -> None:
    found = run(plan_of("gru", "mamba", "mamba2"))
    placed = {r["model"]: r for r in found.values() if "unreachable" not in r}
    assert placed["gru"]["target"] == 560 and placed["gru"]["cost"]["state_bytes"] == 536
    assert placed["mamba"]["target"] == 2048
    small = placed["mamba2"]
    assert small["target"] is None and small["cost"]["state_bytes"] == 3608
    (large,) = [r for name, r in placed.items() if name.startswith("mamba2 +key=")]
    assert abs(large["cost"]["state_bytes"] - 16384) < 0.1 * 16384 and large["target"] == 16384
    assert candidate_of(large["model"], "none") == "mamba2 grown none"
    told = {
        (r["model"], r["target"]): r["unreachable"] for r in found.values() if "unreachable" in r
    }
    assert set(told) == {
        *(("gru", size) for size in SIZES[1:]),
        *(("mamba", size) for size in (560, 4096, 16384)),
        *(("mamba2", size) for size in (560, 2048, 4096)),
    }
    assert "shrinking loses" in told["mamba2", 560] and "one size" in told["mamba", 4096]
    assert "no construction" in told["gru", 4096]
    assert "no whole factor comes nearer than 3,608" in told["mamba2", 4096]


def test_growing_preserves_the_function() -> None:
    found = run(plan_of("mamba2", tasks=("newline:length=40",), sizes=(16384,)))
    small, large = found.values()
    assert large["cost"]["state_bytes"] > 4 * small["cost"]["state_bytes"]
    assert large["per_sample"] == pytest.approx(small["per_sample"], rel=1e-5)


def test_the_file_holds_curves_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    plan = plan_of("llama", "gru", policies=("tova",), seeds=(0, 1))
    found = run(plan, path)
    kept = json.loads(path.read_text())
    told = kept["recall_against_bytes"]
    assert told["sizes"] == list(SIZES) and len(kept["cells"]) == 2 * (1 + 4) + 2
    by_name = {curve["name"]: curve for curve in told["curves"]}
    assert set(by_name) == {f"{TASK} | {name}" for name in ("llama none", "llama tova", "gru none")}
    tova = by_name[f"{TASK} | llama tova"]
    rows = [r for r in found.values() if r.get("policy", "").startswith("tova:")]
    assert tova["x"] == sorted({r["cost"]["state_bytes"] for r in rows}) and len(tova["x"]) == 4
    for x, y in zip(tova["x"], tova["y"]):
        own = [r["metrics"]["accuracy"] for r in rows if r["cost"]["state_bytes"] == x]
        assert y == pytest.approx(sum(own) / 2) and len(own) == 2
    assert (tova["x_unit"], tova["y_unit"]) == ("bytes of state", "accuracy")
    assert [one["model"] for one in told["unreachable"]] == ["gru"] * 3
    monkeypatch.setattr(grid_module, "evaluate_batch", lambda *a: pytest.fail("run again"))
    before = path.read_bytes()
    assert run(plan, path) == found and path.read_bytes() == before


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    cost, more = {"state_bytes": 10}, {"interval": None, "policy": "none", "task": "t"}
    rows = [{"model": "m", "metrics": {"accuracy": v}, "cost": cost, **more} for v in (1.0, None)]
    assert byte_curves(rows[1:])[0].x == () and byte_curves(rows[:1])[0].y == (1.0,)


def test_the_verb_marks_what_is_out_of_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("llama", "gru"):
        MODELS[name]().save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    verb = ["eval", "llama", "gru", "--task", TASK, "-n", "2", "--bytes"]
    assert main([*verb, "560B,4KiB", "--policy", "tova"]) == 0
    shown = capsys.readouterr().out
    assert "as it is" in shown and "560 B" in shown and "4.0 KiB" in shown
    assert "- [1]" in shown and "[1] not reachable: resize: layer 0 is 'gru'" in shown
    assert main([*verb, "4KiB", "--policy", "tova", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [("unreachable" in r) for r in told] == [False, False, False, True]
    for more, said in (
        (["4KiB", "--policy", "tova:budget=9"], "bytes take the place of its budget"),
        (["4KiB", "--policy", "context:length=9"], "bounds no list of keys and values"),
        (["4KiB", "--policy", "forgetmore"], "no option 'budget'"),
        (["4KiB", "--policy", "tovva"], "did you mean 'tova'"),
        (["0B"], "=0, expected at least 1 byte"),
    ):
        assert main([*verb, *more]) == (2 if "did you mean" in said else 1), more
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert main([*verb, "4cows"]) != 0 and "4cows" in capsys.readouterr().err


SETTINGS = EqualBytesSettings(hidden_size=32, num_steps=4, batch_size=4, eval_every=2, num_eval=8)
TINY = dataclasses.replace(
    SETTINGS,
    sizes=(2048, 6144),
    policies=("tova", "window:sinks=4"),
    pairs=2,
    length=16,
    vocab=16,
    max_parameters=1_000_000,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "transformer"])
def test_a_size_is_solved_for_and_measured(name: str) -> None:
    reached = []
    for target in (2048, 4096, 8192):
        found = solve(name, target, 2, 64, SETTINGS)
        if isinstance(found, Reached):
            assert abs(found.bytes - target) <= 0.1 * target
            base = name.removesuffix("-grown")
            near = [
                build(config_of(base, size, 2, 64, SETTINGS), 0, CPU).init_state(1).nbytes
                for size in range(max(1, found.size - 1), found.size + 2)
            ]
            assert found.bytes in near
            if name == base:
                assert min(abs(n - target) for n in near) == abs(found.bytes - target)
            reached.append(found)
    assert len(reached) >= 2
    assert [r.parameters for r in reached] == sorted(r.parameters for r in reached)


def test_what_is_out_of_reach_says_why() -> None:
    assert "the nearest state has" in solve("mamba2", 900, 2, 64, SETTINGS)
    few = dataclasses.replace(SETTINGS, max_parameters=100_000)
    assert "parameters, more than 100,000" in solve("gru", 16384, 2, 64, few)


def study(
    tmp_path: Path, systems, seeds=(0,), listen=lambda point: None, tasks=("mqar",)
) -> dict[str, dict]:
    place = Place(tmp_path, CPU, listen)
    made = equal_bytes.cells(TINY, systems, seeds, place, tasks)
    return {cell.key: cell.run() for cell in made}


def test_every_family_stands_in_one_file(tmp_path: Path) -> None:
    assert [f"{name}/2" for name in NAMES] == list(equal_bytes.DEFAULT)
    found = study(tmp_path, [f"{name}/1" for name in NAMES])
    found |= study(tmp_path, ["gla/1", "transformer/1"], tasks=("copying",))
    assert len(found) == (8 * 2 + 1) + (2 + 1)
    whole = {"about": about("equal-bytes", TINY, "c", CPU), "cells": found}
    for task, candidates in points_of(whole).items():
        names = NAMES if task == "mqar" else ("gla", "transformer")
        assert {name.partition(" ")[0] for name in candidates} == set(names)
        for name, sizes in candidates.items():
            for target, points in sizes.items():
                for point in points:
                    if "unreachable" in point:
                        continue
                    assert 0 <= point["accuracy"] <= 1
                    if target is not None and name.startswith("transformer"):
                        assert 0 < point["bytes"] <= target
                    elif target is not None:
                        assert abs(point["bytes"] - target) <= 0.1 * target
        full = candidates["transformer"][None][0]["bytes"]
        small, large = (candidates["transformer tova"][size][0]["bytes"] for size in TINY.sizes)
        assert full >= large > small
    rows = table(whole)
    assert len(rows) == (8 + 3) + (1 + 3) and {"2 KiB", "6 KiB", "as it is"} <= set(rows[0])
    assert any(row["6 KiB"] == "-" for row in rows), "nothing was out of reach"
    for curve in curves(whole):
        assert list(curve.x) == sorted(curve.x) and curve.x_unit == "bytes of state"
    grown = found["mqar/mamba2-grown/1/6144/seed0"]
    assert grown["before"]["parameters"] < grown["parameters"]
    assert grown["before"]["steps"] == grown["steps"] == 2


def test_a_seed_is_reproduced_and_an_interrupted_cell_goes_on(tmp_path: Path) -> None:
    systems = ("mamba2-grown/1", "transformer/1")
    first = study(tmp_path / "a", systems, (0, 1))
    stopped = []

    def stop(point: dict) -> None:
        stopped.append(point["key"])
        if len(stopped) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "b", systems, (0, 1), stop)
    again = study(tmp_path / "b", systems, (0, 1))
    assert again == first
    a, b = (first[f"mqar/transformer/1/all/seed{seed}"] for seed in (0, 1))
    assert a["curve"] != b["curve"] and a["points"] != b["points"]


def test_the_study_verb(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "r.json"
    verb = ["study", "equal-bytes", "--output", str(out), "--num-steps", "2", "--eval-every", "2"]
    verb += ["--num-eval", "4", "--batch-size", "2", "--hidden-size", "16", "--task", "mqar"]
    verb += ["--bytes", "2KiB,600B", "--policy", "tova", "--system", "gru/1"]
    assert main([*verb, "--system", "transformer/1"]) == 0
    shown = capsys.readouterr().out
    assert "2 KiB" in shown and "transformer" in shown
    kept = json.loads(out.read_text())
    assert set(kept["cells"]) == {
        "mqar/gru/1/2048/seed0",
        "mqar/gru/1/600/seed0",
        "mqar/transformer/1/all/seed0",
    }
    assert kept["about"]["settings"]["sizes"] == [2048, 600]
    if importlib.util.find_spec("matplotlib"):
        figures.draw(out, tmp_path / "f.png")
        first = (tmp_path / "f.png").read_bytes()
        figures.draw(out, tmp_path / "f.png")
        assert (tmp_path / "f.png").read_bytes() == first
    other = str(tmp_path / "other.json")
    for more, said in (
        (["--bytes", "4KiB"], "was made with other settings"),
        (["--output", other, "--policy", "tova:budget=4"], "take the place of its budget"),
        (["--output", other, "--system", "grru/1"], "did you mean 'gru'"),
        (["--output", other, "--bytes", "2KiB,2KiB"], "expected different numbers"),
        (["--output", other, "--pairs", "99"], "pairs=99, expected 1 to 31"),
        (["--output", other, "--grow", "1"], "=1, expected at least 2"),
    ):
        assert main([*verb, *more]) == 1, more
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not Path(other).exists()
    assert main([*verb, "--task", "mqqar"]) != 0
