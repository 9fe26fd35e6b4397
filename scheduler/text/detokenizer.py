"""Token ids to text, one at a time, without ever breaking a UTF-8 character.

What comes out, joined, is the tokenizer's own decoding of all the ids with special
tokens left out. mlx-lm's streaming detokenisers are not used because they show
special tokens and drop a leading space that the tokenizer keeps; tokenizers'
``DecodeStream`` is not because it raises on bytes that are no UTF-8.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from tokenizers import Tokenizer

_MARK = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PENDING_TOKENS = 8  # a character is at most four tokens of one byte each


class Detokenizer(Protocol):
    """The text of one answer, token by token."""

    def add(self, token: int) -> str:
        """The text that this token completes; incomplete characters are held back."""
        ...

    def end(self) -> str:
        """What is left when no more tokens come."""
        ...


def detokenizers(tokenizer: Tokenizer) -> Callable[[], Detokenizer]:
    """What makes a detokeniser for each answer of this tokenizer.

    Byte-level BPE and SentencePiece-like decoders get a table from ids to bytes;
    anything else is decoded through a window of recent tokens.
    """
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if decoder.get("type") == "ByteLevel":
        pieces = _Pieces(tokenizer, _byte_level)
        return lambda: ByteDetokenizer(pieces, errors="replace", strip=0)
    spaced = _sentencepiece(decoder)
    if spaced is not None:
        mark, strip = spaced
        pieces = _Pieces(tokenizer, lambda token: _byte_fallback(token, mark))
        return lambda: ByteDetokenizer(pieces, errors=_BYTEWISE, strip=strip)
    return lambda: WindowDetokenizer(tokenizer.decode)


class ByteDetokenizer:
    """Ids to bytes by a table, bytes to text by an incremental UTF-8 decoder.

    Bytes that are no UTF-8 become replacement characters. In a run of byte-fallback
    tokens that mixes valid characters with invalid bytes the valid ones are kept;
    tokenizers, which sees the run as a whole, gives those up as well.
    """

    __slots__ = ("_decode", "_pieces", "_strip")

    def __init__(self, pieces: _Pieces, *, errors: str, strip: int) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._strip = strip  # spaces still to be taken off the beginning

    def add(self, token: int) -> str:
        text = self._decode(self._pieces[token])
        return self._begin(text) if self._strip and text else text

    def end(self) -> str:
        text = self._decode(b"", True)
        return self._begin(text) if self._strip and text else text

    def _begin(self, text: str) -> str:
        rest = text
        while self._strip and rest.startswith(" "):
            rest = rest[1:]
            self._strip -= 1
        if rest:
            self._strip = 0
        return rest


class WindowDetokenizer:
    """Decodes a window of recent tokens and shows by how much it grew.

    The window always begins with the tokens of the release before, so that decoders
    which treat the beginning of a text differently do so for nothing that is shown.
    The method of Hugging Face's text-generation-inference.
    """

    __slots__ = ("_decode", "_known", "_read", "_window")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._read = 0  # how many of the window's tokens are shown
        self._known = ""  # their text

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._read
        if len(text) <= len(self._known) or (text.endswith(_MARK) and waiting < _PENDING_TOKENS):
            return ""
        delta = text[len(self._known) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._known = self._decode(self._window)
        return delta

    def end(self) -> str:
        return self._decode(self._window)[len(self._known) :]


class _Pieces(dict[int, bytes]):
    """The bytes of each token, worked out when first asked for; special ones have none."""

    def __init__(self, tokenizer: Tokenizer, to_bytes: Callable[[str], bytes]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in added.values() if token.special}

    def __missing__(self, token: int) -> bytes:
        content = self._tokenizer.id_to_token(token)  # None: a padded vocabulary's id
        if content is None:
            return b""  # not kept: there are as many as numbers
        self[token] = piece = b"" if content in self._special else self._to_bytes(content)
        return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, src/encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token, kept as it is written
        return token.encode()


def _byte_fallback(token: str, mark: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(mark, " ").encode()


def _sentencepiece(decoder: dict[str, Any]) -> tuple[str, int] | None:
    """Space mark and spaces stripped at the beginning; None where the decoder is another."""
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else []
    kinds = [step.get("type") for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    mark = steps[0].get("pattern", {}).get("String")
    if not mark or steps[0].get("content") != " ":
        return None
    if not kinds[3:]:
        return mark, 0
    strip = steps[3]
    if strip.get("content") != " " or strip.get("stop"):
        return None
    return mark, int(strip.get("start", 0))


def _bytewise(error: UnicodeError) -> tuple[str, int]:
    """One replacement character for each bad byte, as tokenizers' ByteFallback gives."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _MARK * (error.end - error.start), error.end


_BYTEWISE = "parallax-bytewise"
codecs.register_error(_BYTEWISE, _bytewise)
