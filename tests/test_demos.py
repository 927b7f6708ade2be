"""The models that come with the package: found by name, whole, and with their effects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import statewright
from statewright import demos
from statewright.cli import main
from statewright.hf.pretrained import locate
from statewright.models.tokenizers import saved_tokenizer

HERE = Path(demos.__file__).parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", demos.MODELS)
def test_ships_small_whole_and_with_its_making(name: str) -> None:
    about, weights = demos.about(name), HERE / name / "model.safetensors"
    assert {"command", "seed", "data", "sha256"} <= set(about)
    assert name in about["command"] and weights.stat().st_size <= 1e6
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == about["sha256"]
    place = locate(f"demo:{name}")
    assert json.loads((place / "config.json").read_text())["dtype"] == "float32"
    model = statewright.load(f"demo:{name}")
    assert model.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.tensor(saved_tokenizer(place)("Call me Ishmael")["input_ids"]).unsqueeze(0)
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_is_not_unpacked_twice_nor_if_it_was_altered(home, tmp_path, monkeypatch) -> None:
    place = locate("demo:recall")
    changed = (place / "model.safetensors").stat().st_mtime_ns
    assert locate("demo:recall") == place
    assert (place / "model.safetensors").stat().st_mtime_ns == changed
    monkeypatch.setenv("STATEWRIGHT_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(demos, "about", lambda model: {"sha256": "0" * 64})
    with pytest.raises(ValueError, match="not the file that the package came with"):
        locate("demo:recall")
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_a_name_that_no_demo_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "demo:colapsed"]) != 0
    assert "did you mean 'demo:collapsed'" in capsys.readouterr().err


def test_is_called_by_its_name(tmp_path, capsys) -> None:
    assert all(demos.called(locate(f"demo:{name}")) == f"demo:{name}" for name in demos.MODELS)
    assert demos.called(tmp_path / "recall") == str(tmp_path / "recall")
    out = str(tmp_path / "converted")
    for words in (
        ["check", "demo:recall", "--only", "fold"],
        ["convert", "demo:recall", "--to", "statewright", "--output-dir", out],
    ):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "demo:recall" in said and str(tmp_path / "home") not in said


def test_writes_a_directory_and_keeps_what_is_there(tmp_path, capsys) -> None:
    target = tmp_path / "demo"
    for _ in range(2):
        assert main(["demo", str(target)]) == 0, capsys.readouterr().err
    assert sorted(p.name for p in target.iterdir()) == sorted([*demos.MODELS, demos.TEXT])
    assert (target / demos.TEXT).read_text() == demos.text()
    capsys.readouterr()
    assert main(["generate", str(target / "collapsed"), "--prompt", "The ", *TWO]) == 0
    own = capsys.readouterr().out
    assert main(["generate", "demo:collapsed", "--prompt", "The ", *TWO]) == 0
    assert capsys.readouterr().out == own


TWO = ["--max-new-tokens", "2", "--temperature", "0"]


@pytest.mark.parametrize("mine", ["book.txt", "recall"])
def test_replaces_nothing_of_the_users(mine: str, tmp_path, capsys) -> None:
    (tmp_path / mine).write_text("years of work")
    assert main(["demo", str(tmp_path)]) == 1
    assert "something else of this name" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == [mine]
    assert (tmp_path / mine).read_text() == "years of work"
