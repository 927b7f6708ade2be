"""From token ids to text: rows, streams and single tokens, by the bytes that tokens stand for.

A token may be part of a character. So bytes are joined first and decoded after, as Python does
(`bytes.decode("utf-8", errors="replace")`), wherever a tokenizer says what its tokens' bytes are.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Parts of a character that a tokenizer without bytes may still leave open.
_MOST_HELD = 3
# What may stand beside a decoder of bytes without changing what is around a token.
_PLAIN = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}


def byte_names() -> list[str]:
    """The character by which GPT-2's kind of vocabulary names each byte, 0 to 255."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


_BYTES = {name: byte for byte, name in enumerate(byte_names())}


class TokenBytes(dict[int, bytes]):
    """The bytes of a token inside a text, by id, for byte-level and byte-fallback vocabularies.

    `TokenBytes.of(tokenizer)` is None for a tokenizer of another kind.
    """

    def __init__(self, backend: Any, byte_level: bool) -> None:
        super().__init__()
        self.backend, self.byte_level = backend, byte_level

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        told = json.loads(backend.decoder.__getstate__())
        kinds = {part["type"] for part in told.get("decoders", [told])}
        byte_level = kinds == {"ByteLevel"}
        known = byte_level or ("ByteFallback" in kinds and kinds <= _PLAIN)
        return cls(backend, byte_level) if known else None

    def __missing__(self, token: int) -> bytes:
        name = self.backend.id_to_token(token)
        self[token] = found = b"" if name is None else self._inside(name)
        return found

    def first(self, token: int) -> bytes:
        """At the start of a text, where some decoders drop a space."""
        found = self[token]
        if self.byte_level or not found or _is_part(found):
            return found
        return self.backend.decoder.decode([self.backend.id_to_token(token)]).encode()

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids (T,) inside a text."""
        distinct = set(ids)
        if max(distinct, default=256) < 256 and all(len(self[token]) == 1 for token in distinct):
            # Rows of single bytes are the long ones; a table takes half the time of a join.
            table = bytes(self[byte][0] if byte in distinct else 0 for byte in range(256))
            return bytes(ids).translate(table)
        return b"".join(map(self.__getitem__, ids))

    def _inside(self, name: str) -> bytes:
        if self.byte_level:
            known = all(character in _BYTES for character in name)
            return bytes(map(_BYTES.__getitem__, name)) if known else name.encode()
        if part := _BYTE.fullmatch(name):
            return bytes.fromhex(part[1])
        return self.backend.decoder.decode(["x", name])[1:].encode()


def bytes_of(tokenizer: Any, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
    """The UTF-8 bytes that ids (T,) stand for; those of `decode` where tokens are no bytes."""
    ids = _plain(ids)
    known = TokenBytes.of(tokenizer)
    if known is None:
        options = {"skip_special_tokens": True} if skip_special_tokens else {}
        return tokenizer.decode(ids, **options).encode()
    if skip_special_tokens:
        added = known.backend.get_added_tokens_decoder()
        special = {token for token, about in added.items() if about.special}
        ids = [token for token in ids if token not in special]
    if not ids:
        return b""
    return known.first(ids[0]) + known.join(ids[1:])


def text_of(tokenizer: Any, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
    """The text of ids (T,); bytes that are no text become U+FFFD as Python decodes them."""
    return bytes_of(tokenizer, ids, skip_special_tokens).decode("utf-8", errors="replace")


def holds(tokenizer: Any, ids: Iterable[int], answer: str) -> bool:
    """Whether an answer is in what ids (T,) say, compared byte by byte."""
    return answer.encode() in bytes_of(tokenizer, ids)


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every id the same name, or the same bytes."""
    if one.get_vocab() == other.get_vocab():
        return True
    ours, theirs = TokenBytes.of(one), TokenBytes.of(other)
    if ours is None or theirs is None or len(one) != len(other):
        return False
    return all(ours[token] == theirs[token] for token in range(len(one)))


def text_stream(tokenizer: Any, ids: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
    """Yield the text of ids as soon as it is certain, never half a character.

    The pieces together are `text_of` all ids up to the end-of-text token, which ends the stream.
    context: the last tokens before them, if there are any; a character that they leave open is
    finished.
    """
    ended = _until(ids, tokenizer.eos_token_id)
    known = TokenBytes.of(tokenizer)
    if known is None:
        yield from _unsure_stream(tokenizer, ended, context)
        return
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    begins = not context
    decoder.decode(known.join(context))
    for token in ended:
        text = decoder.decode(known.first(token) if begins else known[token])
        begins = False
        if text:
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def token_labels(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    r"""A text per token to show it by. A character that is cut into several tokens is whole in the
    first of them; the others, and bytes that are no text, show their bytes as `\xe2`."""
    ids, known = _plain(ids), TokenBytes.of(tokenizer)
    if known is None:
        return [tokenizer.decode([token]) for token in ids]
    parts = [known[token] for token in ids]
    characters = iter(b"".join(parts).decode("utf-8", errors="surrogateescape"))
    labels, begin, at = [], 0, 0
    for part in parts:
        label = [f"\\x{byte:02x}" for byte in part[: max(0, at - begin)]]
        begin += len(part)
        while at < begin:
            raw = next(characters).encode("utf-8", errors="surrogateescape")
            label.append(raw.decode("utf-8", errors="backslashreplace"))
            at += len(raw)
        labels.append("".join(label))
    return labels


def _unsure_stream(tokenizer: Any, ids: Iterable[int], context: Sequence[int]) -> Iterator[str]:
    """Every piece is decoded behind the one before it, because many tokenizers drop the space
    before the first word that they decode."""
    before, held = list(context), []
    while before and len(held) < _MOST_HELD and tokenizer.decode(before).endswith("\ufffd"):
        held.insert(0, before.pop())
    for token in chain(ids, [None]):
        held += [] if token is None else [token]
        start, text = tokenizer.decode(before), tokenizer.decode(before + held)
        if token is not None and text.endswith("\ufffd"):
            if len(held) <= _MOST_HELD:
                continue
            text = tokenizer.decode(before + held[:1])
            before, held = held[:1], held[1:]
        elif held:
            before, held = held, []
        if len(text) > len(start):
            yield text[len(start) :]


def _until(ids: Iterable[int], end: int | None) -> Iterator[int]:
    for token in ids:
        if token == end:
            return
        yield token


def _is_part(found: bytes) -> bool:
    """Whether a single byte is no character of its own."""
    return len(found) == 1 and found[0] >= 0x80


def _plain(ids: Iterable[int]) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)
