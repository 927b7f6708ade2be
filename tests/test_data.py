"""Text in, batches out: nothing lost, nothing shared between documents, pure functions of step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewright import text_file
from statewright.models.tokenizers import byte_tokenizer, character_tokenizer
from statewright.text_file import read_text
from statewright.train.data import IGNORED, Corpus, Lanes, corpus_of, encode, stretches

EOS = 256
many = settings(max_examples=60, deadline=None, derandomize=True)
documents = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def corpus(lengths: list[int] | int) -> Corpus:
    """Documents of these lengths whose tokens are their positions: every mix-up shows."""
    lengths = [lengths] if isinstance(lengths, int) else lengths
    starts = np.cumsum([0, *lengths[:-1]])
    return Corpus(np.arange(sum(lengths), dtype=np.int32), starts, sum(lengths))


TEXTS = {
    "ascii": "the quick brown fox. " * 9000,
    "multi-byte across blocks": "a" + "€𝄞é ☃" * 20000,
    "no space at all": "x" * 200_001,
    "one space, then none": "a b" + "c" * 150_000,
    "spaces only between letters": "a b" + " " * 150_000 + "c d",
    "newlines": "line\r\n\tnext\n\n" * 12000,
    "short": "é",
    "byte order mark": "\ufeffword",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_pieces_join_to_the_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    pieces = list(read_text(path))
    assert "".join(pieces) == text.removeprefix("\ufeff")
    assert all(pieces)
    assert max(map(len, pieces)) <= 3 * 2**16


@given(text=st.text(min_size=1), block=st.integers(1, 7))
@many
def test_any_text_in_any_blocks(tmp_path_factory, text: str, block: int) -> None:
    text = text.replace("\0", "") + "."
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "_PIECE", block)
        assert "".join(read_text(path)) == text.removeprefix("\ufeff")


def test_words_are_not_cut(tmp_path: Path) -> None:
    """A piece ends before a space between two words, as byte-pair tokenizers need it."""
    path = tmp_path / "text"
    path.write_text("some words " * 40_000)
    pieces = list(read_text(path))
    assert len(pieces) > 3
    assert all(piece[0] == " " and piece[1] != " " for piece in pieces[1:])


BAD = {
    "missing": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "white": (b" \n\t \r\n" * 30_000, "the file is empty"),
    "nul": (b"abc\0def", "binary"),
    "nul late": (b"a " * 100_000 + b"\0", "binary"),
    "latin-1": ("caffè e tè".encode("latin-1"), "not UTF-8"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8"),
    "ends inside": ("abc€".encode()[:-1], "ends inside a character"),
}


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD.keys())
def test_bad_files_are_one_clear_error(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        list(read_text(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        list(read_text(tmp_path))


def test_encode_is_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    long = "né " * 50_000
    ids = [i for part in encode([long, "", "x"], tokenizer) for i in part]
    assert ids == list(long.encode()) + [ord("x")]


def test_encode_with_a_slow_tokenizer() -> None:
    class Slow:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [len(text)]

    assert list(encode(["abc", "de"], Slow())) == [[3], [2]]


def test_one_document_has_no_end() -> None:
    found = corpus_of([["né ", "x"]], byte_tokenizer())
    assert found.tokens.tolist() == list("né x".encode())
    assert found.starts.tolist() == [0]
    assert found.num_bytes == 5 and found.tokens.dtype == np.uint16


def test_documents_end_and_start() -> None:
    found = corpus_of([["ab"], ["é"], ["x", "y"]], byte_tokenizer())
    assert found.tokens.tolist() == [*b"ab", EOS, *"é".encode(), EOS, *b"xy", EOS]
    assert found.starts.tolist() == [0, 3, 6]
    assert found.num_bytes == 6 and found.num_tokens == 9


def test_fingerprint_knows_tokens_and_starts() -> None:
    assert corpus([5, 5]).fingerprint == corpus([5, 5]).fingerprint
    assert corpus([5, 5]).fingerprint != corpus([4, 6]).fingerprint
    assert corpus(10).fingerprint != corpus(11).fingerprint


def test_big_vocabularies_get_wider_tokens() -> None:
    text = "".join(map(chr, range(0x20, 0xD000))) + "".join(map(chr, range(0x10000, 0x13000)))
    tokenizer = character_tokenizer(text)
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16 - len(tokenizer))])
    assert corpus_of([["abc"]], tokenizer).tokens.dtype == np.int32


@given(lengths=documents, share=st.floats(0, 1))
@many
def test_split_cuts_once(lengths: list[int], share: float) -> None:
    whole = corpus(lengths)
    first, last = whole.split(share)
    assert np.array_equal(np.concatenate([first.tokens, last.tokens]), whole.tokens)
    assert last.num_tokens == round(whole.num_tokens * share)
    for part in (first, last):
        if part.num_tokens:
            inside = {int(part.tokens[s]) for s in part.starts} - {int(part.tokens[0])}
            own = set(part.tokens.tolist()) - {int(part.tokens[0])}
            assert inside == own & set(whole.starts.tolist())
            assert part.starts[0] == 0


@given(lengths=documents, lanes=st.integers(1, 4), length=st.integers(1, 9), seed=st.integers(0, 3))
@many
def test_lanes(lengths: list[int], lanes: int, length: int, seed: int) -> None:
    """All promises of a batch at once, over three passes of documents of any lengths."""
    whole = corpus(lengths)
    if whole.num_tokens < lanes * length + 1:
        with pytest.raises(ValueError, match="the text has"):
            Lanes(whole, lanes, length, seed)
        return
    drawn = Lanes(whole, lanes, length, seed)
    per_pass, ring = drawn.steps_per_pass, whole.num_tokens - 1
    starts = torch.from_numpy(whole.starts)
    for passes in range(3):
        targets: list[int] = []
        before = None
        for step in range(passes * per_pass, (passes + 1) * per_pass):
            b = drawn.batch(step)
            assert b.ids.shape == b.labels.shape == b.reset.shape == (lanes, length)
            following = b.ids + 1
            across = torch.isin(following, starts)
            assert torch.equal(b.labels, following.masked_fill(across, IGNORED))
            due = torch.isin(b.ids, starts)
            due[:, 0] |= before is None
            assert torch.equal(b.reset, due)
            line = b.ids if before is None else torch.cat([before[:, -1:], b.ids], 1)
            assert torch.equal(line[:, 1:], (line[:, :-1] + 1) % ring)
            targets += following.flatten().tolist()
            before = b.ids
        assert len(set(targets)) == len(targets)
        assert ring - len(targets) < lanes * length + lanes


def test_batches_are_pure() -> None:
    drawn, again = Lanes(corpus([70, 30]), 3, 5, seed=2), Lanes(corpus([70, 30]), 3, 5, seed=2)
    first = drawn.batch(7)
    for step in (0, 29, 7, 3, 7):
        drawn.batch(step)
    for b in (drawn.batch(7), again.batch(7)):
        assert torch.equal(b.ids, first.ids) and torch.equal(b.labels, first.labels)
        assert torch.equal(b.reset, first.reset)


def test_passes_turn_by_the_seed() -> None:
    """The first pass begins at the text's beginning; later ones elsewhere, by seed and pass."""
    firsts = {}
    for seed in range(3):
        drawn = Lanes(corpus(1000), 2, 7, seed)
        firsts[seed] = [int(drawn.batch(p * drawn.steps_per_pass).ids[0, 0]) for p in range(5)]
        assert firsts[seed][0] == 0
    flat = [first for line in firsts.values() for first in line[1:]]
    assert len(set(flat)) == len(flat)


def test_the_state_sees_its_own_document_only() -> None:
    """Where a label is ignored, the next token of that row starts afresh."""
    drawn = Lanes(corpus([3, 1, 9, 4, 20]), 2, 6)
    for step in range(drawn.steps_per_pass - 1):
        here, after = drawn.batch(step), drawn.batch(step + 1)
        resets = torch.cat([here.reset, after.reset], 1)[:, 1:7]
        assert torch.equal(here.labels == IGNORED, resets)


def test_too_short_says_what_is_needed() -> None:
    Lanes(corpus(41), 4, 10)
    with pytest.raises(ValueError, match=r"has 40 tokens, but 4 lanes of 10 need 41") as caught:
        Lanes(corpus(40), 4, 10)
    assert "fewer lanes" in str(caught.value)


@given(lengths=documents, rows=st.integers(1, 5), length=st.integers(1, 12))
@many
def test_stretches_cover_every_target(lengths: list[int], rows: int, length: int) -> None:
    whole = corpus([rows, *lengths])
    scored, before = [], None
    for b in stretches(whole, rows, length):
        counted = b.labels[b.labels != IGNORED]
        assert torch.equal(b.ids[b.labels != IGNORED] + 1, counted)
        scored += counted.tolist()
        due = torch.isin(b.ids, torch.from_numpy(whole.starts))
        due[:, 0] |= before is None
        assert not (due & ~b.reset).any()
        if before is not None:
            joins = (b.ids[:, 0] == before + 1) | (b.labels == IGNORED).all(1)
            assert joins.all()
        before = b.ids[:, -1]
    expected = set(range(1, whole.num_tokens)) - set(whole.starts.tolist())
    assert len(scored) == len(expected) and set(scored) == expected
