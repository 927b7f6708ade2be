"""X10: the post-training of StateX as numbers, and as options of `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from statewright.cli import main
from statewright.models import load
from statewright.train.config import TrainConfig
from statewright.train.loop import make_optimizer
from statewright.train.presets import PRESETS, STATEX


def test_the_schedule_is_the_papers() -> None:
    config = TrainConfig(**STATEX)
    assert config.rate(1000) == 3e-4 == max(map(config.rate, range(0, 20_001, 10)))
    assert config.rate(20_000) == 0 and config.rate(10_500) == pytest.approx(1.5e-4)
    # The paper's first step has rate 0 and changes nothing; ours is a thousandth of the peak.
    assert config.rate(0) == pytest.approx(3e-7) and config.rate(499) == pytest.approx(1.5e-4)
    assert config.num_steps * config.num_lanes * config.length == 20_000 * 524_288
    assert (config.weight_decay, config.clip, config.dtype) == (0.1, 1.0, "float32")
    for preset in PRESETS.values():
        TrainConfig(**preset)


def test_preset_on_a_resized_model(tmp_path: Path, capsys) -> None:
    """resize, then train --preset: its options hold unless given, only matrices decay."""
    book, out = tmp_path / "book.txt", tmp_path / "run"
    book.write_text("It was the best of times, it was the worst of times. " * 60)
    first = ["--mixer", "mamba2:state_size=4:head_dim=16", "--hidden-size", "16", "--mlp-ratio"]
    first += ["1", "--num-layers", "2", "--num-steps", "2", "--num-lanes", "2", "--length", "16"]
    base, bigger = str(tmp_path / "base"), str(tmp_path / "bigger")
    text = ["--text", str(book)]
    assert main(["train", *text, "--output-dir", base, *first]) == 0
    assert main(["resize", base, "--key", "2x", "--layers", "all", "--output-dir", bigger]) == 0
    short = ["--num-steps", "3", "--num-lanes", "2", "--length", "16"]
    argv = ["train", "--model", bigger, "--preset", "statex", *text, *short]
    assert main([*argv, "--output-dir", str(out)]) == 0
    record = json.loads((next(out.glob("checkpoint-*")) / "run.json").read_text())
    options = {**STATEX, "num_steps": 3, "num_lanes": 2, "length": 16}
    assert {name: record["config"][name] for name in options} == options
    model = load(out)
    assert model.config.mixer == "mamba2:state_size=8:head_dim=16"
    assert model.dtype == torch.float32
    decayed, plain = make_optimizer(model, TrainConfig(**options)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} <= {"weight"}
    assert {"A_log", "D", "dt_bias", "bias"} <= {
        names[id(p)].split(".")[-1] for p in plain["params"]
    }
    assert plain["weight_decay"] == 0 and decayed["weight_decay"] == 0.1
    capsys.readouterr()
    assert main([*argv[:3], "--preset", "statx", *text, "--output-dir", str(out) + "2"]) == 2
    assert "'statx' is not 'statex'" in capsys.readouterr().err
    assert main(["train", "--output-dir", str(out), "--resume", "--preset", "statex"]) == 2
    assert "leave out --preset" in capsys.readouterr().err
