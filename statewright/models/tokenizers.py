"""Two tokenizers for training from scratch; both save with the model and load with AutoTokenizer.

They are ordinary fast tokenizers of the `tokenizers` library, so nothing of ours is needed to
read them back. Any other Hugging Face tokenizer works in their place.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from statewright.hf.hub import require_reachable
from statewright.token_text import byte_names

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte: ids 0..255 are the bytes, 256 is `<|endoftext|>`. Lossless.

    Bytes that are no text decode to U+FFFD as `bytes.decode("utf-8", errors="replace")` does.
    Tokens are named as in GPT-2's vocabulary.

    >>> byte_tokenizer()("hi")["input_ids"]
    [104, 105]
    """
    vocabulary = {name: byte for byte, name in enumerate(byte_names())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def character_tokenizer(text: str) -> PreTrainedTokenizerBase:
    """One token per character of `text`, in code point order, then `<|unknown|>`, `<|endoftext|>`.

    Other characters become `<|unknown|>`. Raises ValueError for an empty text.

    >>> character_tokenizer("abc")("cab")["input_ids"]
    [2, 0, 1]
    """
    characters = sorted(set(text))
    if not characters:
        raise ValueError("character_tokenizer: the text is empty")
    vocabulary = {character: i for i, character in enumerate([*characters, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = _single_characters()
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer, unk_token=UNKNOWN)


def load_tokenizer(name: str, text: str = "") -> PreTrainedTokenizerBase:
    """`bytes`, `characters` (of `text`), or the path or id of any Hugging Face tokenizer."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "characters":
        return character_tokenizer(text)
    if Path(name).is_dir():
        return saved_tokenizer(name)
    if Path(name).exists():
        raise ValueError(f"tokenizer {name!r}: expected bytes, characters, a directory or an id")
    close = difflib.get_close_matches(name, ["bytes", "characters"], n=1, cutoff=0.7)
    try:
        require_reachable(name)
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = f"did you mean {close[0]!r}?" if close else str(error).splitlines()[0]
        raise ValueError(
            f"tokenizer {name!r} is neither bytes, characters, a directory nor an id ({reason})"
        ) from error


def saved_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a model; ValueError if it is missing or damaged.

    A byte tokenizer of before 0.1 names its tokens `<0x41>`, and one bad byte undoes a run of its
    decoder: `byte_tokenizer()`, of the same ids, takes its place.
    """
    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return _renewed(found)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{directory}: its tokenizer is missing or damaged ({reason})") from error


def _renewed(found: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    if found.get_vocab() != {**names, END_OF_TEXT: 256}:
        return found
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = found.chat_template
    return tokenizer


def _single_characters() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")


def _finish(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )
