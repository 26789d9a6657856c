"""The text of a growing sequence of tokens, piece by piece and in linear time."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class StreamDecoder(Protocol):
    """Text of tokens that arrive one by one. A piece never ends inside a UTF-8 character."""

    def push(self, token_id: int) -> str:
        """Text that the token completes; empty while a character is still incomplete."""

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character that was never completed."""


class ByteStreamDecoder:
    """Decodes the bytes of the tokens as they come; bytes that are no UTF-8 become U+FFFD at once.

    Args:
        bytes_of: bytes of a token; none for one that is to be skipped.
        strip: most spaces to take from the beginning.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], strip: int = 0) -> None:
        self._bytes_of, self._strip = bytes_of, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        piece = self._decoder.decode(self._bytes_of(token_id))
        if self._strip and piece:
            kept = piece.lstrip(" ")
            taken = min(self._strip, len(piece) - len(kept))
            self._strip = 0 if kept else self._strip - taken
            return piece[taken:]
        return piece

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStreamDecoder:
    """For decoders that look at more than one token at a time: decodes a short window again and again.

    Args:
        decode: text of token ids.
        context: ids that come before, whose text is not asked for.
    """

    MOST_PENDING = 8
    """Tokens after which a text that ends in U+FFFD is taken to stay so: a character has four bytes at most."""

    MOST_CONTEXT = 16
    """Tokens before the pending ones that may settle their spacing."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(context[-self.MOST_CONTEXT :])  # tokens whose text was sent
        self._pending: list[int] = []  # tokens that end inside a character

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        piece = self._pending_text()
        if piece.endswith("\ufffd") and len(self._pending) < self.MOST_PENDING:
            return ""
        self._advance()
        return piece

    def flush(self) -> str:
        piece = self._pending_text() if self._pending else ""
        self._advance()
        return piece

    def _advance(self) -> None:
        self._context = (self._context + self._pending)[-self.MOST_CONTEXT :]
        self._pending = []

    def _pending_text(self) -> str:
        sent = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(sent) :]
