"""The shape of a page, and how it lies in the arena.

The arena is `u16[num_units, *unit_shape]`. A page holds `page_size` tokens of all layers; layer l of the page that
begins at unit p occupies `units_per_layer` units from `p + l * units_per_layer` on:

    | K of head 0 | K of head 1 | ... | V of head 0 | V of head 1 | ... | scales and the like       | padding |
      T x W words   T x W words         T x W words                       each part head after head

W is the words of one head vector in the codec of keys or in that of values (`Codec.vector_words`). Only a layer as a
whole is rounded up to units.
"""

import math
from dataclasses import dataclass

MAX_UNIT_WORDS = 128
NARROWEST_BITS = 4
# What a TPU copies as a whole: 8 sublanes of 128 lanes.
TPU_TILE = (8, 128)


@dataclass(frozen=True)
class PageGeometry:
    """What a page's layout depends on besides its format.

    Attributes:
        num_layers: layers of the model.
        kv_heads: key and value heads of a layer.
        head_dim: length of a head vector.
        page_size: tokens a page holds (T).
        unit_words: 16-bit words of an arena unit.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    unit_words: int

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """A unit in the arena: a row of words, or where it is made of TPU tiles, rows of 128 words."""
        rows, lanes = TPU_TILE
        return (self.unit_words,) if self.unit_words % (rows * lanes) else (self.unit_words // lanes, lanes)


def choose_unit_words(head_dim: int, page_size: int, narrowest_bits: int = NARROWEST_BITS, *, tpu: bool = False) -> int:
    """Words of an arena unit.

    A TPU tile on a TPU. Elsewhere the longest unit, up to 128 words, of which a head's T x W block is a whole number in
    every format: a power of two; blocks of wider formats are multiples of the narrowest one's.
    """
    if tpu:
        return math.prod(TPU_TILE)
    narrowest_block = page_size * head_dim * narrowest_bits // 16
    return math.gcd(narrowest_block, MAX_UNIT_WORDS)
