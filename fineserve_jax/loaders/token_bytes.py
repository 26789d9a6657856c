"""What bytes each token stands for, read off the decoder of a `tokenizers` object.

Tokens are pieces of bytes, not of characters: a character may be cut between two of them, or a token may be no valid
UTF-8 at all. With the bytes of each token known, a text is decoded in linear time as its tokens come, and a token is
told from any other whatever it looks like.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteRule(NamedTuple):
    """How vocabulary entries become bytes.

    Attributes:
        to_bytes: bytes of an entry.
        strip: most spaces to take from the beginning of a text.
    """

    to_bytes: Callable[[str], bytes]
    strip: int


def byte_rule(backend: tokenizers.Tokenizer) -> ByteRule | None:
    """The rule of this tokenizer; None for a decoder that is more than a map from entries to bytes."""
    if backend.decoder is None:
        return None
    steps = _steps(json.loads(backend.decoder.__getstate__()))
    if any(step["type"] == "ByteLevel" for step in steps):
        return ByteRule(_byte_level, 0) if len(steps) == 1 else None
    replaced, strip, has_bytes = [], 0, False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
                replaced.append((old, " "))
                strip = 0 if scheme == "never" else 1
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                strip = start
            case _:
                return None
    return ByteRule(lambda text: _replaced(text, replaced, has_bytes), strip)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


def _replaced(text: str, replaced: list[tuple[str, str]], has_bytes: bool) -> bytes:
    if has_bytes and (byte := BYTE_TOKEN.fullmatch(text)):
        return bytes.fromhex(byte.group(1))
    for old, new in replaced:
        text = text.replace(old, new)
    return text.encode()


def _byte_level(text: str) -> bytes:
    """Bytes of an entry in GPT-2's alphabet; an added token that is not written in it is its own text."""
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError:
        return text.encode()


def byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()
