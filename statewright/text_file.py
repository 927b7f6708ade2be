"""Text files: every file of a user's text is read here, so that all verbs agree on what text is."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 14
# The longer marks first: UTF-32's begins with UTF-16's.
_FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | Path) -> Iterator[str]:
    """The file's text in pieces of about 16 KB, cut before a space, never inside a character.

    A UTF-8 byte order mark at the start is not text; line ends stay as they are. Raises ValueError
    if the file is missing, empty, binary (it holds a NUL byte), or not UTF-8, with the byte's
    place.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        held, empty = "", True
        for text in _decoded(file, path):
            if "\0" in text:
                raise ValueError(f"{path}: a binary file (it holds NUL bytes), expected text")
            empty = empty and not text.strip()
            text, held = _cut(held + text)
            if text:
                yield text
    if empty:
        raise ValueError(f"{path}: the file is empty")
    if held:
        yield held


def whole_text(path: str | Path) -> str:
    """All of `read_text` in one string."""
    return "".join(read_text(path))


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file and their numbers from 1, one at a time; .gz is unpacked.

    Raises ValueError, with the line's number, for what is no UTF-8 text or a damaged .gz.
    """
    path, number = Path(path), 0
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}, after line {number}: a damaged .gz file") from error


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    """Blocks of text; what a block ends inside of comes with the next."""
    head = file.read(4)
    for mark, name in _FOREIGN.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: {name} text, expected UTF-8 (iconv -f {name} -t UTF-8)")
    # Blocks begin after the mark, so that the pieces are those of the same file without it.
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        begin = file.tell() - len(decoder.getstate()[0])
        block = file.read(_PIECE)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            what = error.reason if block else "it ends inside a character"
            where = f"byte {begin + error.start:,}"
            raise ValueError(f"{path}: not UTF-8 text ({what}, {where})") from error
        if not block:
            return
        yield text


def _cut(text: str) -> tuple[str, str]:
    """Cut before the last space between two words: no byte-pair token of GPT's kind spans it."""
    at = text.rfind(" ", 1, len(text) - 1)
    while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
        at = text.rfind(" ", 1, at)
    return (text, "") if at <= 0 else (text[:at], text[at:])
