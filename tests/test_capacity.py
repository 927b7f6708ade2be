"""Capacity: what a cell trains and measures, a small grid from end to end, and plans."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch
from rich.console import Console

from statewright.cli import main
from statewright.cli.capacity import _live
from statewright.diagnosis.repair import Trial
from statewright.models.tokenizers import byte_tokenizer
from statewright.studies import capacity, capacity_laws
from statewright.studies.capacity import Study
from statewright.studies.capacity_keys import passkey_rows
from statewright.studies.capacity_laws import (
    Law,
)
from statewright.studies.capacity_model import build, state_numbers
from statewright.studies.capacity_plan import plan
from statewright.studies.capacity_settings import CapacitySettings, Shape
from statewright.studies.capacity_table import fits, measured, rows
from statewright.studies.censored import Interval
from statewright.studies.experiment import Place
from statewright.tasks.base import IGNORED
from statewright.train.data import Corpus

TEXT = " ".join(topics.topics[name] for name in sorted(topics.topics))[:60_000]
TINY = CapacitySettings(
    hidden_size=16, head_dim=8, num_layers=1, num_steps=4, tokens_per_step=64, times=2,
    num_texts=2, num_warmup_steps=1, eval_every=2, save_every=2,
)  # fmt: skip


def study(tmp_path: Path, settings: CapacitySettings = TINY, lengths=(8, 16)) -> Study:
    tokens = np.frombuffer(TEXT.encode(), np.uint8)
    corpus = Corpus(tokens, np.array([0]), len(tokens))
    place = Place(tmp_path, torch.device("cpu"), lambda point: None)
    return Study(settings, lengths, corpus, place)


def test_what_counts_as_a_collapse(tmp_path, monkeypatch) -> None:
    grid = study(tmp_path)

    def explodes(*octaves: float) -> bool:
        trial = Trial("none", 1.0, 0.0, tuple((16 * 2**i, x) for i, x in enumerate(octaves)))
        monkeypatch.setattr(capacity, "try_policy", lambda *a: trial)
        return grid.read_on(None, 8)["explodes"]

    assert not explodes(1.0, 1.0 + math.log(2) - 1e-6)
    assert explodes(1.0, 1.0 + math.log(2) + 1e-6)
    assert explodes(1.0, 2.0, 1.0)  # anywhere, not only at the end
    assert explodes(1.0, math.nan) and explodes(math.nan, 1.0) and explodes(1e6, 1.0)


def test_texts_are_as_long_as_asked(tmp_path, monkeypatch) -> None:
    """So many training lengths, or as many tokens for every cell."""
    read = []

    def trial(model, texts, length: int, policy: str) -> Trial:
        read.append((tuple(texts.shape), length))
        return Trial("none", 1.0, 0.0, ((length, 1.0),))

    monkeypatch.setattr(capacity, "try_policy", trial)
    for settings in (TINY, replace(TINY, read_length=128)):
        for length in (8, 16):
            study(tmp_path, settings).read_on(None, length)
    assert read == [((2, 17), 8), ((2, 33), 16), ((2, 129), 8), ((2, 129), 16)]
    with pytest.raises(ValueError, match=r"read_length=16, expected 0 or at least twice .* 16"):
        study(tmp_path, replace(TINY, read_length=16))
    with pytest.raises(ValueError, match="read_length=24, expected a power of two"):
        replace(TINY, read_length=24)


def test_systems_differ_in_what_they_should() -> None:
    settings = replace(TINY, hidden_size=32, num_layers=2)
    for shape in (Shape(4), Shape(64), Shape(16, heads=12)):
        low = build("low-decay", shape, settings, 0)
        official = build("official", shape, settings, 0)
        transformer = build("transformer", shape, settings, 0)
        heads = shape.heads or 2 * 32 // 8
        assert state_numbers(low) == 2 * heads * 8 * shape.state
        names = [n for n, p in official.named_parameters() if not n.endswith("A_log")]
        weights = dict(low.named_parameters())
        assert all(torch.equal(weights[n], p) for n, p in official.named_parameters() if n in names)
        A = "model.layers.0.mixer.A_log"
        ratio = (weights[A] - dict(official.named_parameters())[A]).exp()
        assert torch.allclose(ratio, torch.tensor(1e-3), rtol=1e-4)
        assert state_numbers(transformer) == 0
        count = {m: sum(p.numel() for p in m.parameters()) for m in (low, transformer)}
        assert count[transformer] == pytest.approx(count[low], rel=0.01)
    with pytest.raises(ValueError, match="its attention alone"):
        build("transformer", Shape(1, heads=1), settings, 0)
    with pytest.raises(ValueError, match="expected 16 or state=16"):
        Shape.parse("state=16:tails=3")
    assert Shape.parse("state=16:heads=3") == Shape(16, 3) and str(Shape.parse("8")) == "state=8"


def test_passkey_rows_teach_the_answer() -> None:
    tokenizer = byte_tokenizer()
    ids, targets = passkey_rows(512, 5, 7, tokenizer)
    assert torch.equal(ids, passkey_rows(512, 5, 7, tokenizer)[0])
    assert not torch.equal(ids, passkey_rows(512, 5, 8, tokenizer)[0])
    for row, wanted in zip(ids, targets):
        at = (wanted != IGNORED).nonzero().flatten()
        assert len(at) == 12  # the second mention and the answer, a space and five digits each
        said, answer = wanted[at[:6]], wanted[at[6:]]
        assert torch.equal(said, answer)
        assert torch.equal(row[at[:5] + 1], said[:5])  # a target is the next token
        assert bytes(row[at[6] - 3 : at[6] + 1].tolist()) == b"y is"


def test_keys_are_trained_on_and_recalled(tmp_path) -> None:
    settings = replace(
        TINY, num_steps=2, tokens_per_step=1024, passkey_share=0.5, longest_recall=512, num_eval=2
    )
    with_keys = study(tmp_path, settings, (256, 512)).run("official", Shape(4), 512, 0, "k")
    assert set(with_keys["recall"]) == {"256", "512"}
    assert with_keys["train_loss"] > 10  # the text's loss and the keys', ln 257 each at first
    text = study(tmp_path, replace(settings, passkey_share=0.0, longest_recall=0), (256, 512))
    plain = text.run("official", Shape(4), 512, 0, "t")
    assert "recall" not in plain and 5 < plain["train_loss"] < 6
    alone = replace(settings, passkey_share=1.0)
    with pytest.raises(ValueError, match="text: expected one, or passkey_share=1"):
        study(tmp_path, alone, (256, 512))
    only = Study(alone, (256, 512), None, text.place)
    assert only._rows(512, 0)(0) is None and only._keys(512, 0)(0)[0].shape == (2, 512)


def test_an_interrupted_cell_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    settings = replace(TINY, num_steps=6)
    whole = study(tmp_path / "a", settings)
    wanted = whole.run("low-decay", Shape(4), 16, 0, "x/seed0")

    def stop(point: dict) -> None:
        if point["step"] == 4:
            raise KeyboardInterrupt

    cut = study(tmp_path / "b", settings)
    cut.place = replace(cut.place, listen=stop)
    with pytest.raises(KeyboardInterrupt):
        cut.run("low-decay", Shape(4), 16, 0, "x/seed0")
    assert cut.place.snapshot("x/seed0").exists()
    cut.place = replace(cut.place, listen=lambda point: None)
    resumed = cut.run("low-decay", Shape(4), 16, 0, "x/seed0")
    for found in (wanted, resumed):
        found.pop("trained_seconds")
    assert resumed == wanted
    other = whole.run("low-decay", Shape(4), 16, 1, "x/seed1")
    assert other["train_loss"] != wanted["train_loss"]


def grid(tmp_path: Path, *more: str) -> int:
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = ["--size", "2", "--size", "4", "--length", "8", "--length", "16"]
    small = ["--hidden-size", "16", "--head-dim", "8", "--num-layers", "1", "--num-steps", "3"]
    read = ["--tokens-per-step", "64", "--times", "2", "--num-texts", "2"]
    where = ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "r.json")]
    return main(["capacity", *where, *sizes, *small, *read, *more])


def test_a_small_grid_from_end_to_end(tmp_path, capsys) -> None:
    assert grid(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "no fit of T_forget" in shown and "5.172 N_S - 4.469" in shown
    file = tmp_path / "r.json"
    first = json.loads(file.read_text())
    systems = [key.split("/")[0] for key in first["cells"]]
    assert systems == ["low-decay"] * 4 + ["official"] * 2 + ["transformer"] * 2
    assert {cell["tokens"] for cell in first["cells"].values()} == {192}
    cut = json.loads(file.read_text())
    lost = cut["cells"].pop("low-decay/state=4/16/seed0")
    file.write_text(json.dumps(cut))
    assert grid(tmp_path) == 0
    again = json.loads(file.read_text())["cells"]
    timed = ("seconds", "trained_seconds")
    found = {k: v for k, v in again["low-decay/state=4/16/seed0"].items() if k not in timed}
    assert found == {k: v for k, v in lost.items() if k not in timed}
    assert all(again[key] == cell for key, cell in cut["cells"].items())
    capsys.readouterr()
    for wrong, said in (
        (["--num-steps", "4"], "num-steps=3 (now 4)"),
        (["--length", "12"], "12 is no power of two"),
        (["--length", "128"], "divisors of --tokens-per-step=64"),
        (["--system", "mamba3"], "unknown system 'mamba3'"),
        (["--size", "2"], "given twice"),
        (["--figure", "a.txt"], "a.txt"),
    ):
        assert grid(tmp_path, *wrong) != 0
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (tmp_path / "text.txt").write_text("another")
    assert main(["capacity", "--text", str(tmp_path / "text.txt"), "--output", "x.json"]) != 0
    assert "held-out tokens" in capsys.readouterr().err


def test_the_table_is_live_on_a_terminal(tmp_path) -> None:
    console = Console(force_terminal=True, width=160, file=io.StringIO())
    (tmp_path / "r.json").write_text(json.dumps(results(Law(2.0, 0.05), 1)))
    with _live(console, tmp_path / "r.json") as (listen, renew):
        listen({"key": "low-decay/state=10/64/seed0", "step": 3, "train_loss": 1.25})
        renew("low-decay/state=10/64/seed0", {"seconds": 60.0, "ratio": 1.0}, 1, 3)
    shown = console.file.getvalue()
    assert "1 of 3 cells, about 2 minutes left" in shown and "(64, 128]" in shown


def results(law: Law, seeds: int = 2) -> dict:
    """A file of results in which training lengths below a law explode."""
    cells = {}
    for x in (0.001, 0.01, 0.02, 0.04, 0.08, 0.16):
        for length in (32, 64, 128, 256, 512):
            for seed in range(seeds):
                cells[f"low-decay/state={round(1e3 * x)}/{length}/seed{seed}"] = {
                    "millions": x,
                    "length": length,
                    "parameters": 1,
                    "explodes": length < 1024 * law(x),
                }
    settings = {"explosion": 2.0, "times": 32, "recall_threshold": 0.95}
    return {"about": {"study": "capacity", "settings": settings}, "cells": cells}


def test_results_become_intervals_and_a_plan() -> None:
    found = results(Law(2.0, 0.05))
    one = measured(found["cells"])[2]
    assert (one.size, one.forget, one.odd) == ("state=10", Interval(64, 128), False)
    assert [row["N_S (M)"] for row in rows(found)] == [
        "0.001",
        "0.01",
        "0.02",
        "0.04",
        "0.08",
        "0.16",
    ]
    fitted = fits(found, "low-decay")
    assert fitted["forget"].law(0.08) == pytest.approx(0.21, abs=0.07)
    assert list(fitted) == ["forget"]
    own, published, _ = plan(80_000, found).estimates
    assert own.low <= own.tokens / 2 < 2 * own.tokens <= own.high and not own.extrapolated
    assert own.source == "results, low-decay" and published.tokens == 0
    far = plan(10**6, found)
    assert far.estimates[0].extrapolated and far.train_length > 2048
    found["cells"]["low-decay/state=80/512/seed0"]["explodes"] = True
    assert any(m.odd for m in measured(found["cells"]))


def test_a_plan_by_the_published_laws() -> None:
    forget, recall = plan(12_900_000).estimates
    assert forget.tokens == pytest.approx(62.25 * 1024, rel=1e-3) and not forget.extrapolated
    assert (forget.low, forget.high) == (
        round(forget.tokens / 2),
        pytest.approx(2 * forget.tokens, abs=2),
    )
    assert recall.tokens == pytest.approx(257.8 * 1024, rel=1e-2)
    assert plan(12_900_000).train_length == 131072
    far = plan(40_000_000).estimates[0]
    assert far.extrapolated and "extrapolated" in far.note and far.high > 9 * far.tokens
    assert plan(10**12).estimates[1].tokens <= 2**53
    small = plan(800_000)
    assert small.estimates[0].tokens == 0 and small.train_length == 0
    with pytest.raises(ValueError, match="no matrix state"):
        plan(0)


def test_size_plans(tmp_path, capsys) -> None:
    model = build("official", Shape(64), replace(TINY, hidden_size=64), 0)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "r.json").write_text(json.dumps(results(Law(2.0, 0.05))))
    argv = ["size", str(tmp_path / "m"), "--plan"]
    assert main(argv) == 0
    assert "no training length can be named" in capsys.readouterr().out
    assert main([*argv, "--plan-from", str(tmp_path / "r.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["numbers"] == 8192 and found["estimates"][0]["source"] == "results, low-decay"
    assert main(["size", "--family", "llama", "--plan"]) != 0
    assert "no matrix state" in capsys.readouterr().err
    assert main(["size", str(tmp_path / "m"), "--plan-from", __file__]) != 0
    assert "--plan-from needs --plan" in capsys.readouterr().err


def test_the_figure_is_drawn_from_results(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from statewright.studies.figures import draw

    (tmp_path / "r.json").write_text(json.dumps(results(Law(2.0, 0.05))))
    draw(tmp_path / "r.json", tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_settings_refuse_what_cannot_be_measured(tmp_path) -> None:
    for wrong, said in (
        ({"times": 3}, "times=3, expected a power of two"),
        ({"longest_recall": 256}, "longest_recall=256"),
        ({"passkey_share": 1.5}, "passkey_share=1.5"),
        ({"held_out_share": 1.0}, "held_out_share=1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, **wrong)
    with pytest.raises(ValueError, match="a key needs 256 tokens"):
        study(tmp_path, replace(TINY, passkey_share=0.5))
    assert replace(TINY, longest_recall=1024).recall_lengths == (256, 512, 1024)
    assert capacity_laws.check_lengths([128, 64]) == (64, 128)
