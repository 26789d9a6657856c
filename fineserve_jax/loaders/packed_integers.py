"""Integers of a few bits that checkpoints pack into 32-bit words."""

from __future__ import annotations

import numpy as np

WORD_BITS = 32


def unpack_words(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """i32[..., n] -> u8[..., n * (32 // bits)], from the lowest bits of a word to the highest.

    bits: of a value: 2, 4 or 8, or a number that leaves the highest bits of a word unused.
    order: for each value of a word, the place among them at which it lies.
    """
    per_word = WORD_BITS // bits
    places = order or range(per_word)
    shifts = np.array([place * bits for place in places], np.uint32)
    values = words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return values.astype(np.uint8).reshape(*words.shape[:-1], words.shape[-1] * per_word)


def unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """i32[n, columns] -> u8[n * 32 // bits, columns]: each column is one run of bits, also across its words."""
    rows, columns = words.shape
    if WORD_BITS % bits == 0:
        return np.ascontiguousarray(unpack_words(np.ascontiguousarray(words.T), bits).T)
    as_bytes = np.ascontiguousarray(words.T).view(np.uint8)
    single = np.unpackbits(as_bytes, axis=1, bitorder="little").reshape(columns, rows * WORD_BITS // bits, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.ascontiguousarray((single * weights).sum(axis=2, dtype=np.uint8).T)
