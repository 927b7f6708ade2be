"""The tokenizers for training from scratch: lossless, predictable, read back by AutoTokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_kinds import earlier_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from statewright.models.tokenizers import (
    END_OF_TEXT,
    UNKNOWN,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    saved_tokenizer,
)
from statewright.token_text import TokenBytes, byte_names, text_stream

BYTES = byte_tokenizer()
CHARACTERS = character_tokenizer("hello world\n€𝄞")
many = settings(max_examples=150, deadline=None, derandomize=True)
STRANGE = [
    "",
    " ",
    "  a  ",
    "\n\r\n\t",
    "<0x41>",
    "don 't .",
    "\u200d👩‍👩‍👧",
    "\0",
    "\ufeffa",
    "\u2028",
    "a\u0301",
]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(text=st.text())
@many
def test_bytes_are_lossless(text: str) -> None:
    found = ids(BYTES, text)
    assert found == list(text.encode())
    assert BYTES.decode(found) == text


@pytest.mark.parametrize("text", STRANGE)
def test_strange_texts_are_lossless(text: str) -> None:
    assert ids(BYTES, text) == list(text.encode())
    assert BYTES.decode(ids(BYTES, text)) == text


def test_vocabulary_of_bytes() -> None:
    assert len(BYTES) == 257
    assert BYTES.convert_ids_to_tokens(list(range(256))) == byte_names()
    known = TokenBytes.of(BYTES)
    assert [known[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert BYTES.eos_token_id == BYTES.bos_token_id == BYTES.pad_token_id == 256


@given(st.lists(st.sampled_from(sorted(set("hello world\n€𝄞"))), max_size=30))
@many
def test_known_characters_are_lossless(characters: list[str]) -> None:
    text = "".join(characters)
    assert len(ids(CHARACTERS, text)) == len(text)
    assert CHARACTERS.decode(ids(CHARACTERS, text)) == text


def test_characters_in_code_point_order() -> None:
    tokenizer = character_tokenizer("cab€a\n")
    assert ids(tokenizer, "\nabc€") == [0, 1, 2, 3, 4]
    assert tokenizer.convert_tokens_to_ids([UNKNOWN, END_OF_TEXT]) == [5, 6]
    assert len(tokenizer) == 7


def test_unknown_characters() -> None:
    unknown = CHARACTERS.unk_token_id
    found = ids(CHARACTERS, "hXoéZZ")
    assert [i == unknown for i in found] == [False, True, False, True, True, True]
    assert CHARACTERS.decode(found) == f"h{UNKNOWN}o{UNKNOWN * 3}"


def test_characters_of_nothing() -> None:
    with pytest.raises(ValueError, match="empty"):
        character_tokenizer("")


@pytest.mark.parametrize("tokenizer", [BYTES, CHARACTERS], ids=["bytes", "characters"])
def test_reloads_equal(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.padding_side == "left"
        for text in ["hello  world .", "né\0☃", *STRANGE]:
            assert ids(again, text) == ids(tokenizer, text)
            assert again.decode(ids(again, text)) == tokenizer.decode(ids(tokenizer, text))


@pytest.mark.parametrize("tokenizer", [BYTES, CHARACTERS], ids=["bytes", "characters"])
def test_pads_left(tokenizer) -> None:
    batch = tokenizer(["hello", "he"], padding=True)
    end = tokenizer.pad_token_id
    assert batch["input_ids"][1] == [end] * 3 + ids(tokenizer, "he")
    assert batch["attention_mask"][1] == [0, 0, 0, 1, 1]


def test_names() -> None:
    assert load_tokenizer("bytes").get_vocab() == BYTES.get_vocab()
    assert ids(load_tokenizer("characters", "ba"), "ab") == [0, 1]


@pytest.mark.parametrize("kind", ["nowhere", "file", "empty directory", "damaged"])
def test_bad_names_are_one_clear_line(kind: str, tmp_path: Path) -> None:
    name = tmp_path / "tokenizer"
    if kind == "file":
        name.write_text("x")
    elif kind != "nowhere":
        name.mkdir()
    if kind == "damaged":
        (name / "tokenizer.json").write_text("{")
        (name / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer") as caught:
        load_tokenizer(str(name) if kind != "nowhere" else "no-such-tokenizer-anywhere")
    assert "\n" not in str(caught.value)


def streamed(tokenizer, found: list[int], context: tuple[int, ...] = ()) -> list[str]:
    return list(text_stream(tokenizer, iter(found), list(context)))


@given(text=st.text())
@many
def test_streams_are_lossless(text: str) -> None:
    assert "".join(streamed(BYTES, ids(BYTES, text))) == text


def test_streams_come_at_once_and_never_in_half() -> None:
    assert streamed(BYTES, ids(BYTES, "a€b𝄞")) == ["a", "€", "b", "𝄞"]
    assert streamed(BYTES, [*b"ab", BYTES.eos_token_id, *b"c"]) == ["a", "b"]
    assert streamed(BYTES, [*b"a", 0xE2, 0x82]) == ["a", "\ufffd"]
    assert len(streamed(BYTES, [0x80] * 1000)) > 10


def test_streams_keep_the_spaces_of_words() -> None:
    """Llama's kind of tokenizer drops the space before the first word that it decodes."""
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert "".join(streamed(tokenizer, [0, 1, 2, 0])) == "the cats the"
    assert "".join(streamed(tokenizer, [1, 2], context=(0,))) == " cats"


@pytest.mark.parametrize("change", ["none", "an added token"])
def test_a_byte_tokenizer_saved_earlier_loads_as_todays(change: str, tmp_path: Path) -> None:
    tokenizer = earlier_bytes()
    tokenizer.chat_template = "{{ messages }}"
    if change != "none":
        tokenizer.add_tokens("<pad>")
    tokenizer.save_pretrained(tmp_path)
    loaded, text = saved_tokenizer(tmp_path), "café\n🙂"
    assert (loaded.decode(list(b"hello\xe2 world")) == "hello\ufffd world") is (change == "none")
    assert loaded(text).input_ids == list(text.encode()) == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template and len(loaded) == len(tokenizer)
    assert loaded.all_special_ids == tokenizer.all_special_ids == [256]
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.decode([0x61, 0xE2]) == loaded.decode([0x61, 0xE2])
