"""The verbs as functions: models by place or by hand, texts as they are, as files, as ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from statewright import (
    StatewrightConfig,
    StatewrightForCausalLM,
    byte_tokenizer,
    check,
    diagnose,
    evaluate,
    load,
    repair,
    resize,
)
from statewright.diagnosis.repair import LENGTHS, ROWS

LENGTH = 8
TEXT = "the quick brown fox jumps over the lazy dog, and " * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = StatewrightConfig(
        hidden_size=16, num_hidden_layers=2, mixer="mamba2:state_size=4:head_dim=8", mlp_ratio=0
    )
    config.train_length = LENGTH
    directory = tmp_path_factory.mktemp("model")
    StatewrightForCausalLM(config).eval().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "book.txt").write_text(TEXT)
    return directory


def ids() -> torch.Tensor:
    return torch.tensor([list(TEXT.encode())], dtype=torch.int32)


def test_diagnose_takes_places_and_texts(place: Path) -> None:
    want = diagnose(load(place), ids(), LENGTH)
    for model, text in [(place, TEXT), (str(place), place / "book.txt"), (place, ids())]:
        found = diagnose(model, text)
        assert found.model == str(place)
        assert found.text == want.text and found.remembrance == want.remembrance
    assert want.text.reading.length == len(TEXT) - 1 and want.text.reading.train_length == LENGTH
    with_witness = diagnose(load(place), TEXT, tokenizer=byte_tokenizer(), prompts=["newlines"])
    assert [other.prompt for other in with_witness.others] == ["newlines"]


def test_repair_takes_places_and_texts(place: Path) -> None:
    tokens, half = ids()[0], len(TEXT) // 2
    size = min(LENGTHS * LENGTH + 1, half // ROWS)
    stride = (half - size) // (ROWS - 1)
    rows = [
        torch.stack([part[i * stride : i * stride + size] for i in range(ROWS)])
        for part in (tokens[:half], tokens[half : 2 * half])
    ]
    kinds = ("statewindow",)
    want = repair(load(place), *rows, LENGTH, kinds)
    assert len(want.trials) == 4 and want.train_length == LENGTH
    assert repair(place, TEXT, kinds=kinds) == want
    assert repair(place, place / "book.txt", kinds=kinds) == want
    halves = repair(load(place), ids(), kinds=kinds)
    assert halves.before.octaves[-1][0] == half - 1
    with pytest.raises(ValueError, match="report: expected token ids"):
        repair(place, TEXT, ids())


def test_check_and_evaluate_take_places(place: Path) -> None:
    found = check(place, names=["fold"])
    assert (found.name, found.failed(["fold"])) == (str(place), [])
    assert check(load(place), names=["fold"]).name == "model"
    task = "passkey:length=300"
    by_place = evaluate(str(place), None, task, n=2)
    by_hand = evaluate(load(place), byte_tokenizer(), task, n=2)
    assert by_place.per_sample == by_hand.per_sample and by_place.metrics == by_hand.metrics


def test_resize_returns_a_model(place: Path) -> None:
    small, large = load(place), resize(load(place), 2, "all")
    assert large.init_state(1).nbytes > small.init_state(1).nbytes
    torch.testing.assert_close(large(ids().long()).logits, small(ids().long()).logits)


@pytest.mark.parametrize("verb", [diagnose, repair])
def test_what_a_text_is(verb, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=r"'book.txt' names a file, expected Path\('book.txt'\)"):
        verb(place, "book.txt")
    with pytest.raises(ValueError, match="text: empty"):
        verb(place, "")
    with pytest.raises(ValueError, match="no such file"):
        verb(place, Path("lost.txt"))
    with pytest.raises(ValueError, match="expected a tokenizer beside it, or token ids"):
        verb(load(place), TEXT)
    with pytest.raises(ValueError, match="two training lengths"):
        verb(place, "too short")
    with pytest.raises(ValueError, match="two training lengths"):
        verb(place, ids(), train_length=len(TEXT))


def test_the_training_length_is_asked_for(place: Path) -> None:
    model = load(place)
    del model.config.train_length
    for verb in (diagnose, repair):
        with pytest.raises(ValueError, match="give train_length=N"):
            verb(model, ids())
