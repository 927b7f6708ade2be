"""Tokens to text as Python decodes bytes: rows, streams of any split, labels, answers, files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_kinds import KINDS
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from statewright.evaluation import score
from statewright.evaluation.answers import Manner, answers
from statewright.models.tokenizers import byte_tokenizer, character_tokenizer
from statewright.tasks import TASKS, build_task
from statewright.token_text import (
    TokenBytes,
    holds,
    same_tokens,
    text_of,
    text_stream,
    token_labels,
)

BYTES = byte_tokenizer()
many = settings(max_examples=80, deadline=None, derandomize=True)
PYTHON_ONLY = SimpleNamespace(
    eos_token_id=None, decode=lambda ids: bytes(ids).decode("utf-8", errors="replace")
)
every_kind = pytest.mark.parametrize("kind", KINDS)
INVALID = [
    b"hello\xe2 world",
    b"\xf0\x9f\x98",
    b"\xe2\x82a",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\x80" * 9,
]
# Whole characters and pieces of them, so that a few bytes meet every case of UTF-8.
rows = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=3),
        st.sampled_from([*"aé€🙂 \n中", "\ufffd", "\ufeff"]).map(str.encode),
        st.sampled_from([b"\xe2\x82", b"\xf0\x9f\x99", b"\xed\xa0", b"\xf4\x90"]),
    ),
    max_size=12,
).map(b"".join)


def python(row: bytes) -> str:
    return row.decode("utf-8", errors="replace")


def ids_of(kind: str, row: bytes) -> list[int]:
    """One token per byte."""
    known = TokenBytes.of(KINDS[kind])
    single = {known[i]: i for i in reversed(range(len(KINDS[kind])))}
    return [single[bytes([byte])] for byte in row]


class Kept(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, **options: bool) -> None:
        super().__init__(tokenizer, **options)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


@pytest.mark.parametrize("reloaded", [False, True])
def test_bytes_that_are_no_text_decode_as_in_python(reloaded: bool, tmp_path: Path) -> None:
    tokenizer = BYTES
    if reloaded:
        BYTES.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    want = [python(row) for row in INVALID]
    assert want[0] == "hello\ufffd world"
    assert [tokenizer.decode(list(row)) for row in INVALID] == want
    assert tokenizer.batch_decode([list(row) for row in INVALID]) == want
    end = tokenizer.eos_token_id
    ended = [[*row, end] for row in INVALID]
    assert tokenizer.batch_decode(ended, skip_special_tokens=True) == want
    assert [text_of(tokenizer, row, skip_special_tokens=True) for row in ended] == want
    for clean in (False, True):
        assert tokenizer.decode(list(b"a . \xe2!"), clean_up_tokenization_spaces=clean) == (
            "a . \ufffd!"
        )


@given(row=rows)
@many
def test_rows_and_streams_are_pythons(row: bytes) -> None:
    assert BYTES.decode(list(row)) == python(row)
    for kind, tokenizer in KINDS.items():
        ids = ids_of(kind, row)
        want = python(row[row[:1] == b" " :] if kind == "byte-fallback" else row)
        assert text_of(tokenizer, torch.tensor(ids, dtype=torch.int64)) == want
        assert "".join(text_stream(tokenizer, ids)) == want
        assert "".join(text_stream(tokenizer, ids, ids_of(kind, b"a"))) == python(row)


@given(row=rows, cut=st.integers(1, 5))
@many
def test_transformers_streamers_print_the_row(row: bytes, cut: int) -> None:
    kept, read = Kept(BYTES), TextIteratorStreamer(BYTES)
    for begin in range(0, len(row), cut):
        for streamer in (kept, read):
            streamer.put(torch.tensor(list(row[begin : begin + cut])))
    kept.end()
    read.end()
    assert kept.text == "".join(read) == python(row)


@given(ids=st.lists(st.integers(0, 2**16), max_size=12), text=st.text(max_size=12))
@many
def test_any_tokens_in_any_order(ids: list[int], text: str) -> None:
    """Merges too: what they say is what the library that made the tokenizer says, if it is text."""
    for kind, tokenizer in KINDS.items():
        chosen = [i % len(tokenizer) for i in ids]
        own = [i for i in chosen if i != tokenizer.eos_token_id]
        if kind == "byte-level":
            assert text_of(tokenizer, chosen) == tokenizer.decode(chosen)
        assert "".join(text_stream(tokenizer, own)) == text_of(tokenizer, own)
        assert text_of(tokenizer, chosen, skip_special_tokens=True) == text_of(tokenizer, own)
        written = tokenizer.encode(text, add_special_tokens=False)
        assert text_of(tokenizer, written) == tokenizer.decode(written) == text
        assert "\ufffd" in text or not any("\ufffd" in s for s in text_stream(tokenizer, written))


@every_kind
def test_streams_come_at_once_and_end_with_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = ids_of(kind, "a€b𝄞".encode())
    assert list(text_stream(tokenizer, ids)) == ["a", "€", "b", "𝄞"]
    assert list(text_stream(tokenizer, [ids[0], tokenizer.eos_token_id, *ids])) == ["a"]
    assert list(text_stream(tokenizer, ids[:2])) == ["a", "\ufffd"]
    assert len(list(text_stream(tokenizer, ids_of(kind, b"\x80" * 99)))) == 99


def test_streams_of_tokenizers_that_do_not_say_their_bytes() -> None:
    """Decoded behind what came before; a character that a token completes is never printed in half,
    and garbage does not hold the stream."""
    assert list(text_stream(PYTHON_ONLY, "a€b𝄞".encode())) == ["a", "€", "b", "𝄞"]
    assert list(text_stream(PYTHON_ONLY, b"a\xe2")) == ["a", "\ufffd"]
    found = list(text_stream(PYTHON_ONLY, b"\x80" * 50 + "€".encode()))
    assert "".join(found) == "\ufffd" * 50 + "€" and len(found) > 40
    characters = character_tokenizer("é€")
    assert "".join(text_stream(characters, [0, 1])) == "é€"
    assert token_labels(characters, [0, 1]) == ["é", "€"]


@pytest.mark.parametrize("kind", [*KINDS, "python only"])
def test_a_stream_finishes_the_character_that_its_context_leaves_open(kind: str) -> None:
    text = "a€b𝄞é."
    if kind == "python only":
        tokenizer, ids = PYTHON_ONLY, list(text.encode())
    else:
        tokenizer, ids = KINDS[kind], ids_of(kind, text.encode())
    for cut in range(1, len(ids)):
        context = ids[max(0, cut - 8) : cut]
        decode = tokenizer.decode if kind == "python only" else partial(text_of, tokenizer)
        whole = decode(ids[:cut]).rstrip("\ufffd")
        assert "".join(text_stream(tokenizer, ids[cut:], context)) == text[len(whole) :], cut


@every_kind
def test_a_cut_character_stands_with_its_first_token(kind: str) -> None:
    ids = ids_of(kind, "aé€".encode() + b"\xe2 \x80")
    want = ["a", "é", r"\xa9", "€", r"\x82", r"\xac", r"\xe2", " ", r"\x80"]
    assert token_labels(KINDS[kind], torch.tensor(ids)) == want


@given(ids=st.lists(st.integers(0, 2**16), max_size=12))
@many
def test_labels_show_every_byte_once_and_no_replacement(ids: list[int]) -> None:
    for tokenizer in KINDS.values():
        chosen = [i % len(tokenizer) for i in ids]
        labels = token_labels(tokenizer, chosen)
        assert len(labels) == len(chosen) and all(labels) and "\ufffd" not in "".join(labels)
    assert token_labels(BYTES, list("é".encode())) == ["é", r"\xa9"]


def test_earlier_byte_tokenizers_are_the_same() -> None:
    assert same_tokens(KINDS["earlier bytes"], BYTES)
    assert not same_tokens(KINDS["byte-level"], BYTES)
    assert not same_tokens(character_tokenizer("ab"), character_tokenizer("ac"))


# --- answers ---------------------------------------------------------------------------------

PAPER = {
    "title": "A title",
    "abstract": "An abstract",
    "full_text": [{"section_name": "Method", "paragraphs": ["First."]}],
    "qas": [
        {
            "question": "What?",
            "answers": [
                {
                    "answer": {
                        "unanswerable": False,
                        "extractive_spans": [],
                        "yes_no": None,
                        "free_form_answer": "forty two",
                    }
                }
            ],
        }
    ],
}
STORY = {
    "document": "It rained.",
    "questions": [{"question_text": "What?", "responses": [{"response_text": "It rained"}]}],
}
FILES = {
    "squality": ("data", json.dumps(STORY)),
    "qasper": ("data", json.dumps({"1": PAPER})),
    "niah": ("text", "It rains. The sun is out. We go home."),
    "perplexity": ("text", "It rains. " * 600),
    "stream": ("text", "It rains. " * 600),
    "stories": ("prompts", "A story of a boat.\r\nA story of a\u2028house.\r\n"),
}


class Reply(nn.Module):
    """Continues every prompt with the same tokens."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        super().__init__()
        self.ids, self.device = torch.tensor([ids]), torch.device("cpu")
        text = SimpleNamespace(vocab_size=vocab_size)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        return torch.cat([ids, self.ids.expand(len(ids), -1)], 1)


def drawn(spec: str, kind: str, directory: Path, mark: bytes = b""):
    name = spec.partition(":")[0]
    if name in FILES:
        option, content = FILES[name]
        path = directory / f"{name}.txt"
        path.write_bytes(mark + content.encode())
        spec += f":{option}={path}"
    task = build_task(spec)
    return task, task.draw(1, 0, KINDS[kind])


@every_kind
def test_an_invalid_byte_beside_a_right_answer(kind: str, tmp_path: Path) -> None:
    """Every task of the registry whose answer is text, whatever the tokenizer."""
    tokenizer, met = KINDS[kind], set()
    for spec in [*TASKS, "niah:queries=4"]:
        _, batch = drawn(spec, kind, tmp_path)
        sample = batch.samples[0]
        wanted = [sample.answer] if sample.answer else list(sample.references)
        if not wanted:
            continue
        said = b"\xe2" + " ".join(wanted).encode() + b"\xe2 \x80"
        reply = ids_of(kind, said)
        assert all(holds(tokenizer, reply, answer) for answer in wanted)
        assert not holds(tokenizer, reply[:-4], wanted[-1])
        (found,) = answers(Reply(reply, len(tokenizer)), tokenizer, batch, Manner())
        if sample.references:
            assert found.text == python(said).strip()
            assert score("string-match", [found.text], [wanted]).per_sample == (1.0,)
        else:
            assert found.value == 1.0
        met.add(spec)
    assert met >= {"passkey", "niah", "niah:queries=4", "squality", "qasper"}


@pytest.mark.parametrize("name", FILES)
def test_a_task_reads_its_file_without_the_mark(name: str, tmp_path: Path) -> None:
    (plain, marked) = (
        drawn(name, "bytes", tmp_path, m)[1].samples[0] for m in (b"", b"\xef\xbb\xbf")
    )
    assert torch.equal(plain.input_ids, marked.input_ids)


def test_a_premise_ends_with_its_line_only(tmp_path: Path) -> None:
    task, _ = drawn("stories", "bytes", tmp_path)
    assert len(task.draw(2, 0, BYTES).samples) == 2
    with pytest.raises(ValueError, match="there are 2 premises"):
        task.draw(3, 0, BYTES)


def test_which_tasks_have_files() -> None:
    """A task with an option that names a file belongs into FILES."""
    options = {"data", "text", "prompts"}
    assert {n for n, cls in TASKS.items() if options & set(cls.__dataclass_fields__)} == set(FILES)
