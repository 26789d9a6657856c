"""How long a page is in each KV format: what the codecs of `formats` and the simulator share.

No jax: whoever only counts bytes needs none. A format that is registered with `formats.register` is listed here too.
"""

import enum

from fineserve_jax.pallas_kernels.geometry import PageGeometry

WORD_BITS = 16


class Granularity(enum.Enum):
    """How fine one array of scales or zero points of a page and head is: it has one for every ..."""

    TOKEN = "token"  # [..., T, 1]
    CHANNEL = "channel"  # [..., 1, width], the channels of one packed lane
    PAGE = "page"  # [..., 1, 1]


class FormatSizes:
    """What determines a page's size in a KV format.

    Attributes:
        name: what users write, e.g. "int8".
        value_bits: bits of one stored value, scales not counted; a power of two from 1 to 32.
        scales: the arrays of scales and zero points of a page and head, in the order in which they lie in the page.
        residual: None if every token is encoded by itself (all `scales` are then per token). Otherwise the name of the
            token-wise format that holds a page's tokens until the page is full and can be encoded as a whole.

    A word holds `packed_lanes` values. Lane i of all words of a head vector is the i-th of as many contiguous slices.
    """

    name: str
    value_bits: int
    scales: tuple[Granularity, ...] = ()
    residual: str | None = None

    @property
    def packed_lanes(self) -> int:
        """Values that share a word."""
        return max(1, WORD_BITS // self.value_bits)

    @property
    def word_parts(self) -> int:
        """Words that share a value."""
        return max(1, self.value_bits // WORD_BITS)

    def width(self, geometry: PageGeometry) -> int:
        """Values of a packed lane, and words of a word part, of one head vector."""
        return geometry.head_dim // self.packed_lanes

    def vector_words(self, geometry: PageGeometry) -> int:
        """Words (W) of one head vector: `word_parts` parts of `width`."""
        return geometry.head_dim * self.value_bits // WORD_BITS

    def block_words(self, geometry: PageGeometry) -> int:
        """Words of a head's keys in a page, T x W; as many hold its values."""
        return geometry.page_size * self.vector_words(geometry)

    def scale_sizes(self, geometry: PageGeometry) -> tuple[int, ...]:
        """Words of each scale array of a page and head."""
        sizes = {Granularity.TOKEN: geometry.page_size, Granularity.CHANNEL: self.width(geometry), Granularity.PAGE: 1}
        return tuple(sizes[part] for part in self.scales)

    def scale_starts(self, geometry: PageGeometry) -> tuple[int, ...]:
        """Where in a page's layer each scale array begins, in words; it lies there head after head."""
        values = 2 * geometry.kv_heads * self.block_words(geometry)
        sizes = self.scale_sizes(geometry)
        return tuple(values + geometry.kv_heads * sum(sizes[:i]) for i in range(len(sizes)))

    def words_per_layer(self, geometry: PageGeometry) -> int:
        """Words that hold something: a layer of a page without its padding."""
        return geometry.kv_heads * (2 * self.block_words(geometry) + sum(self.scale_sizes(geometry)))

    def units_per_layer(self, geometry: PageGeometry) -> int:
        """Arena units of one layer of a page."""
        return -(-self.words_per_layer(geometry) // geometry.unit_words)

    def page_units(self, geometry: PageGeometry) -> int:
        """Arena units of a page, all layers."""
        return geometry.num_layers * self.units_per_layer(geometry)

    def bits_per_value(self, geometry: PageGeometry) -> float:
        """Bits a cached value costs, scales and padding counted."""
        values = 2 * geometry.kv_heads * geometry.page_size * geometry.head_dim
        return WORD_BITS * self.units_per_layer(geometry) * geometry.unit_words / values


class Float32Sizes(FormatSizes):
    name, value_bits = "fp32", 32


class BFloat16Sizes(FormatSizes):
    name, value_bits = "bf16", 16


class Float16Sizes(FormatSizes):
    name, value_bits = "fp16", 16


class Int8Sizes(FormatSizes):
    name, value_bits = "int8", 8
    scales = (Granularity.TOKEN, Granularity.TOKEN)  # the scales of K, then of V


class Float8Sizes(FormatSizes):
    name, value_bits = "fp8", 8
    scales = (Granularity.TOKEN, Granularity.TOKEN)  # the scales of K, then of V


class Int4Sizes(FormatSizes):
    name, value_bits = "int4", 4
    scales = (*[Granularity.CHANNEL] * 4, Granularity.TOKEN, *[Granularity.PAGE] * 4)  # of K, of V, the units of both
    residual = "int8"


FORMAT_SIZES: dict[str, FormatSizes] = {
    sizes.name: sizes
    for sizes in (Float32Sizes(), BFloat16Sizes(), Float16Sizes(), Int8Sizes(), Float8Sizes(), Int4Sizes())
}
"""Of every registered format, by name."""


def get_format_sizes(name: str) -> FormatSizes:
    """The sizes of the format called `name`. Raises ValueError, naming those there are."""
    try:
        return FORMAT_SIZES[name]
    except KeyError:
        raise ValueError(f"KV format {name!r} is not known; choose one of {', '.join(FORMAT_SIZES)}") from None
