"""Token files, filters, datasets, mixtures and curricula: whole or absent, pure, never shared."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_cli import assert_refused, run  # noqa: F401
from test_data import corpus

from statewright import text_file
from statewright.models.tokenizers import byte_tokenizer, character_tokenizer
from statewright.train.config import parse_curriculum
from statewright.train.data import IGNORED, Lanes, corpus_of, encode
from statewright.train.data_files import (
    TOKENS,
    dataset_documents,
    read_tokens,
    text_documents,
    write_tokens,
)
from statewright.train.data_mix import Mixture, hold_out, lanes_of_weights, make_batches

many = settings(max_examples=40, deadline=None, derandomize=True)
TEXTS = ["one two three", "é", "a longer document, the longest of all", "four"]


def written(directory: Path, texts: list[str] = TEXTS, **options: Any):
    return write_tokens(([text] for text in texts), byte_tokenizer(), directory, **options)


def test_a_token_file_is_the_corpus(tmp_path: Path) -> None:
    kept = written(tmp_path / "d")
    corpus, tokenizer = read_tokens(tmp_path / "d")
    want = corpus_of([[text] for text in TEXTS], byte_tokenizer())
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == want.tokens.dtype
    assert np.array_equal(corpus.tokens, want.tokens)
    assert np.array_equal(corpus.starts, want.starts)
    assert corpus.num_bytes == want.num_bytes and corpus.longest == want.longest == 38
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    assert (kept.documents, kept.tokens) == (4, want.num_tokens)
    for step in range(12):
        ours, theirs = (Lanes(c, 2, 5, seed=1).batch(step) for c in (corpus, want))
        assert all(torch.equal(getattr(ours, n), getattr(theirs, n)) for n in vars(ours))


def test_a_token_file_is_a_safetensors_file(tmp_path: Path) -> None:
    written(tmp_path / "d")
    found, corpus = load_file(tmp_path / "d" / TOKENS), read_tokens(tmp_path / "d")[0]
    assert np.array_equal(found["tokens"], corpus.tokens)
    assert np.array_equal(found["starts"], corpus.starts)


def test_wide_tokens(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("".join(map(chr, [*range(0xD000), *range(0xE000, 0x12000)])))
    write_tokens([["abc"], ["\U00011fff"]], tokenizer, tmp_path / "d")
    corpus, end = read_tokens(tmp_path / "d")[0], tokenizer.eos_token_id
    assert corpus.tokens.tolist() == [97, 98, 99, end, end - 2, end] and end > 2**16
    assert corpus.tokens.dtype == np.int32


def test_short_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    kept = written(tmp_path / "d", min_length=13)
    corpus = read_tokens(tmp_path / "d")[0]
    assert bytes(corpus.tokens[:13].astype(np.uint8)) == b"one two three"
    assert corpus.starts.tolist() == [0, 14] and corpus.num_tokens == 14 + 38
    assert (kept.documents, kept.all_documents, kept.longest) == (2, 4, 37)
    assert (kept.tokens, kept.all_tokens) == (52, 52 + 6)
    assert "2 removed (50.0% of the documents, 10.3% of the tokens)" in str(kept)
    with pytest.raises(ValueError, match=r"nothing is left: 4 .* the longest of 37 .* 38"):
        written(tmp_path / "none", min_length=38)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_the_fingerprint_knows_the_part(tmp_path: Path) -> None:
    written(tmp_path / "a"), written(tmp_path / "b"), written(tmp_path / "c", TEXTS[:3])
    a, b, c = (read_tokens(tmp_path / name)[0] for name in "abc")
    assert a.fingerprint == b.fingerprint != c.fingerprint
    prints = {p.fingerprint for x in (a, b) for p in (*x.split(0.3), *x.split(0.2), x.joined())}
    assert len(prints | {a.fingerprint}) == 6


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def failing():
        yield ["a document"]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_tokens(failing(), byte_tokenizer(), tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "d")
    with pytest.raises(ValueError, match="is there already"):
        written(tmp_path / "d")


@pytest.mark.parametrize("damage", ["cut", "gone", "text", "header", "dtype"])
def test_damaged_token_files_are_one_clear_line(tmp_path: Path, damage: str) -> None:
    written(tmp_path / "d")
    path = tmp_path / "d" / TOKENS
    content = path.read_bytes()
    changed = {
        "cut": content[:-9],
        "text": b"not a token file at all",
        "header": content[:8] + b"x" + content[9:],
        "dtype": content.replace(b'"U16"', b'"F16"'),
    }
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"damaged|no tokens") as caught:
        read_tokens(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_a_special_tokens_name_in_a_text_is_text() -> None:
    """Only documents make boundaries; a prompt's is the token, as before."""
    tokenizer, text = byte_tokenizer(), "a<|endoftext|>b"
    assert corpus_of([[text]], tokenizer).tokens.tolist() == list(text.encode())
    assert list(encode([text], tokenizer)) == [[97, 256, 98]]
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


@given(
    texts=st.lists(st.text("ab <|", max_size=9), min_size=1, max_size=6), block=st.integers(1, 9)
)
@many
def test_boundaries(tmp_path_factory, texts: list[str], block: int) -> None:
    """Whatever the blocks in which the file is read, also across the boundary string itself."""
    path, boundary = tmp_path_factory.getbasetemp() / "b.txt", "<|e|>"
    path.write_text(boundary.join(texts) + ".")
    texts[-1] += "."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "_PIECE", block)
        found = ["".join(pieces) for pieces in text_documents(path, boundary)]
    want = [t for t in boundary.join(texts).split(boundary) if t.strip()]
    assert found == want


def test_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))
    for stream in (False, True):
        assert list(dataset_documents(str(path), stream=stream)) == [[t] for t in TEXTS]
    with pytest.raises(ValueError, match="no text column 'body', but n, text"):
        list(dataset_documents(str(path), column="body"))
    with pytest.raises(ValueError, match="nowhere"):
        list(dataset_documents(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_byte_order_mark_is_no_row(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / f"rows.{kind}"
    body = {"csv": "text\ncaf\xe9\n", "jsonl": '{"text": "caf\xe9"}\n', "txt": "caf\xe9\n"}
    path.write_text(body[kind], encoding="utf-8-sig")
    for stream in (False, True):
        assert list(dataset_documents(str(path), stream=stream)) == [["caf\xe9"]]


GOOD = json.dumps({"text": "caf\xe9", "n": 1}, ensure_ascii=False)
BAD_LINES = {
    "null": ('{"text": null}', "column 'text' is null, expected text"),
    "number": ('{"text": 3}', "column 'text' holds no text, but int"),
    "missing": ('{"body": "x", "id": 1}', "no text column 'text', but body, id"),
    "list": ('["x"]', "expected an object with a column 'text'"),
    "broken": ('{"text": "x', "not JSON (Unterminated string starting at, column 10)"),
    "deep": ("[" * 100_000, "JSON that is nested too deeply"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_json_lines_need_no_package_and_say_which_line_is_wrong(
    packed: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")

    def write(text: str) -> None:
        body = text.encode("utf-8-sig")
        path.write_bytes(gzip.compress(body) if packed else body)

    write(f"{GOOD}\n\n{GOOD}")
    assert list(dataset_documents(str(path))) == [["caf\xe9"]] * 2
    for line, said in BAD_LINES.values():
        write(f"{GOOD}\n\n{line}\n{GOOD}\n")
        with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {said}")):
            list(dataset_documents(str(path)))
    write(GOOD)
    path.write_bytes(path.read_bytes()[:-9] if packed else f"{GOOD}\n".encode("latin-1"))
    wrong = "after line [0-9]: a damaged .gz file" if packed else "line 1: not UTF-8 text"
    with pytest.raises(ValueError, match=wrong):
        list(dataset_documents(str(path)))


def test_a_file_that_is_not_there_is_no_dataset_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        list(dataset_documents(str(tmp_path / "nothing.jsonl")))


def test_without_datasets_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"statewright\[data\]"):
        list(dataset_documents("some/id"))


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), extra=st.integers(0, 40))
@many
def test_lanes_are_shared_by_weight(weights: list[float], extra: int) -> None:
    num_lanes = len(weights) + extra
    lanes = lanes_of_weights(weights, num_lanes)
    assert sum(lanes) == num_lanes and min(lanes) >= 1
    exact = [w / sum(weights) * num_lanes for w in weights]
    if all(e >= 1 for e in exact):
        assert all(abs(n - e) < 1 for n, e in zip(lanes, exact))


def sources():
    return [(corpus([70, 30, 200]), 2.0), (corpus([500]), 1.0)]


def test_a_mixture_is_its_parts_rows() -> None:
    mixed = make_batches(sources(), 6, [(0, 5)], seed=3)
    assert isinstance(mixed, Mixture) and [p.num_lanes for p in mixed.parts] == [4, 2]
    for step in (0, 9, 31):
        whole = mixed.batch(step)
        for part, rows in zip(mixed.parts, (slice(0, 4), slice(4, 6))):
            assert torch.equal(whole.ids[rows], part.batch(step).ids)
            assert torch.equal(whole.labels[rows], part.batch(step).labels)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_a_batch_without_overlap(ranks: int) -> None:
    """Also of a mixture in a curriculum, at any step, and whatever was drawn before."""
    made = make_batches(sources(), 6, [(0, 5), (4, 9)], seed=3)
    for step in (7, 0, 3, 4, 40):
        whole, each = made.batch(step), 6 // ranks
        parts = [made.batch(step, slice(r * each, (r + 1) * each)) for r in range(ranks)]
        for name in vars(whole):
            assert torch.equal(torch.cat([vars(p)[name] for p in parts]), vars(whole)[name])
        assert whole.ids.shape == (6, 5 if step < 4 else 9)


def test_a_curriculum_begins_every_phase_anew() -> None:
    made = make_batches([(corpus(400), 1.0)], 2, [(0, 5), (4, 9)], seed=3)
    assert made.batch(0).reset[:, 0].all() and made.batch(4).reset[:, 0].all()
    assert not made.batch(5).reset.any()
    assert int(made.batch(4).ids[0, 0]) != 0
    line = torch.cat([made.batch(4).ids, made.batch(5).ids], 1)
    assert torch.equal(line[:, 1:] % 399, (line[:, :-1] + 1) % 399)
    assert parse_curriculum("1k@500,4k@2k") == [(500, 1024), (2048, 4096)]
    for wrong in ("1k", "1k@5,2k@5", "x@3", "0@4", "5@0"):
        with pytest.raises(ValueError, match="curriculum="):
            parse_curriculum(wrong)


def test_joined_documents_have_no_boundaries() -> None:
    whole = corpus([30, 30, 40])
    drawn = Lanes(whole.joined(), 2, 7)
    batches = [drawn.batch(step) for step in range(drawn.steps_per_pass)]
    assert not any((b.labels == IGNORED).any() for b in batches)
    assert not any(b.reset.any() for b in batches[1:])


def test_hold_out_takes_the_ends() -> None:
    first, second = corpus([60, 40]), corpus([100, 100])
    kept, held = hold_out([first, second], 0.1, 1000)
    assert [c.num_tokens for c in kept] == [90, 180]
    assert held.tokens.tolist() == [*range(90, 100), *range(180, 200)]
    assert held.starts.tolist() == [0, 10]
    assert hold_out([first, second], 0.1, 3)[1].num_tokens == 3
    assert hold_out([first], 0.0, 3)[1].num_tokens == 0


TINY = ["--num-lanes", 4, "--length", 16, "--hidden-size", 8, "--num-layers", 1]


def test_the_command_line(run, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Some words, again and again. " * 60)
    Path("b.txt").write_text("short<|e|>" + "Other words. " * 90)
    made = run("data", "a.txt", "--output-dir", "a")
    assert made.code == 0 and "1 documents, 1,741 tokens; 0 removed" in made.out
    made = run("data", "b.txt", "--boundary", "<|e|>", "--min-length", "1k", "--output-dir", "b")
    assert "1 removed (50.0% of the documents" in made.out
    train = ["train", "--data", "a=3", "--data", "b", *TINY, "--curriculum", "32@4"]
    ends = [*train, "--num-steps", 6, "--save-every", 3, "--output-dir"]
    assert run(*ends, "whole").code == 0
    record = json.loads(Path("whole/checkpoint-6/run.json").read_text())
    assert record["data_files"] == [[str(tmp_path / "a"), 3.0], [str(tmp_path / "b"), 1.0]]
    for name in Path("whole").glob("checkpoint-6/*"):
        name.unlink()
    Path("whole/checkpoint-6").rmdir()
    before = load_file("whole/model.safetensors")
    assert run("train", "--output-dir", "whole", "--resume").code == 0
    after = load_file("whole/model.safetensors")
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_bad_input_is_one_line(run, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Too short.")
    assert run("data", "a.txt", "--output-dir", "a").code == 0
    assert_refused(run("data", "a.txt", "--output-dir", "a"), "is there already")
    assert_refused(run("data", "a.txt", "--min-length", 99, "--output-dir", "b"), "nothing is left")
    assert_refused(run("data", "--output-dir", "b"), "TEXT files or --dataset")
    assert_refused(run("train", "--data", "a", *TINY, "--output-dir", "r"), "use more text")
    assert_refused(run("train", "--data", "b", *TINY, "--output-dir", "r"), "b")
