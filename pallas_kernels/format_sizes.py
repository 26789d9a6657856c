"""How long a page is in each KV format: what the codecs of `formats` and the simulator share.

No jax: whoever only counts bytes needs none. A format that is registered with `formats.register` is listed here too.
"""

import enum
import math
import re
from collections.abc import Iterable
from typing import TypeVar

from fineserve_jax.pallas_kernels.geometry import PageGeometry

WORD_BITS = 16

F = TypeVar("F", bound="FormatSizes")


class Granularity(enum.Enum):
    """How fine one array of scales or zero points of a page and head is: it has one for every ..."""

    TOKEN = "token"  # [..., T, 1]
    CHANNEL = "channel"  # [..., 1, width], the channels of one packed lane
    PAGE = "page"  # [..., 1, 1]


class CodecSizes:
    """What determines how long the keys of a page are, or its values.

    Attributes:
        name: of the codec, e.g. "int8".
        value_bits: bits of one stored value, scales not counted.
        scales: the arrays of scales and zero points of a page and head.
        residual: None if every token is encoded by itself (all `scales` are then per token). Otherwise the name of the
            token-wise codec that holds a page's tokens until the page is full and can be encoded as a whole.

    A head vector is `word_parts` parts of words that share `packed_lanes` values each way: lane i of all words of a
    part, taken together with the same lanes of the other parts, is the i-th of `packed_lanes` contiguous slices.
    """

    name: str
    value_bits: int
    scales: tuple[Granularity, ...] = ()
    residual: str | None = None

    @property
    def packed_lanes(self) -> int:
        """Values that share a word, or as many words as there are parts."""
        return math.lcm(self.value_bits, WORD_BITS) // self.value_bits

    @property
    def word_parts(self) -> int:
        """Words that share these values."""
        return self.packed_lanes * self.value_bits // WORD_BITS

    def width(self, geometry: PageGeometry) -> int:
        """Values of a packed lane, and words of a word part, of one head vector."""
        return geometry.head_dim // self.packed_lanes

    def vector_words(self, geometry: PageGeometry) -> int:
        """Words (W) of one head vector: `word_parts` parts of `width`."""
        return geometry.head_dim * self.value_bits // WORD_BITS

    def block_words(self, geometry: PageGeometry) -> int:
        """Words of a head's vectors in a page, T x W."""
        return geometry.page_size * self.vector_words(geometry)

    def scale_sizes(self, geometry: PageGeometry) -> tuple[int, ...]:
        """Words of each scale array of a page and head."""
        sizes = {Granularity.TOKEN: geometry.page_size, Granularity.CHANNEL: self.width(geometry), Granularity.PAGE: 1}
        return tuple(sizes[part] for part in self.scales)


class FormatSizes:
    """What determines a page's size in a KV format: the codecs of its keys and of its values."""

    def __init__(self, key: CodecSizes, value: CodecSizes, name: str | None = None) -> None:
        """`name`: what users write; None: as `pair_name` has it."""
        self.key, self.value = key, value
        self.name = name or pair_name(key.name, value.name)

    @property
    def sides(self) -> tuple[CodecSizes, CodecSizes]:
        """The codecs of keys and of values."""
        return self.key, self.value

    @property
    def residual(self) -> str | None:
        """The format that holds a page's tokens until it is full; None: this one, as it encodes each by itself."""
        if self.key.residual is None and self.value.residual is None:
            return None
        return pair_name(self.key.residual or self.key.name, self.value.residual or self.value.name)

    @property
    def value_bits(self) -> float:
        """Bits of a stored value, the mean of keys and values, scales not counted."""
        return (self.key.value_bits + self.value.value_bits) / 2

    def block_starts(self, geometry: PageGeometry) -> tuple[int, int]:
        """Where in a page's layer the keys begin, and the values, in words; they lie there head after head."""
        return 0, geometry.kv_heads * self.key.block_words(geometry)

    def scale_order(self) -> list[tuple[int, int]]:
        """The scale arrays as they lie in a page: side and number of each. Those of one word a head come last."""
        arrays = [(side, i) for side, codec in enumerate(self.sides) for i in range(len(codec.scales))]
        return sorted(arrays, key=lambda array: self.sides[array[0]].scales[array[1]] is Granularity.PAGE)

    def scale_starts(self, geometry: PageGeometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where in a page's layer each scale array of keys and of values begins, in words; there head after head."""
        sizes = [codec.scale_sizes(geometry) for codec in self.sides]
        starts, start = {}, self.bare_words_per_layer(geometry)
        for side, i in self.scale_order():
            starts[side, i] = start
            start += geometry.kv_heads * sizes[side][i]
        of_keys, of_values = (tuple(starts[side, i] for i in range(len(own))) for side, own in enumerate(sizes))
        return of_keys, of_values

    def bare_words_per_layer(self, geometry: PageGeometry) -> int:
        """Words of a layer of a page that hold keys and values, scales not counted."""
        return geometry.kv_heads * sum(codec.block_words(geometry) for codec in self.sides)

    def words_per_layer(self, geometry: PageGeometry) -> int:
        """Words that hold something: a layer of a page without its padding."""
        scales = sum(sum(codec.scale_sizes(geometry)) for codec in self.sides)
        return self.bare_words_per_layer(geometry) + geometry.kv_heads * scales

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


class Float32Sizes(CodecSizes):
    name, value_bits = "fp32", 32


class BFloat16Sizes(CodecSizes):
    name, value_bits = "bf16", 16


class Float16Sizes(CodecSizes):
    name, value_bits = "fp16", 16


class Int8Sizes(CodecSizes):
    name, value_bits = "int8", 8
    scales = (Granularity.TOKEN,)


class Float8Sizes(CodecSizes):
    name, value_bits = "fp8", 8
    scales = (Granularity.TOKEN,)


class Int4KeySizes(CodecSizes):
    name, value_bits = "int4", 4
    scales = (*[Granularity.CHANNEL] * 4, *[Granularity.PAGE] * 2)  # the latter are units
    residual = "int8"


class Int4ValueSizes(CodecSizes):
    name, value_bits = "int4", 4
    scales = (Granularity.TOKEN, *[Granularity.PAGE] * 2)
    residual = "int8"


class Int3KeySizes(CodecSizes):
    name, value_bits = "int3", 3
    scales = (*[Granularity.CHANNEL] * 16, *[Granularity.PAGE] * 2)
    residual = "int8"


class Int3ValueSizes(CodecSizes):
    name, value_bits = "int3", 3
    scales = (Granularity.TOKEN, *[Granularity.PAGE] * 2)
    residual = "int8"


def pair_name(key: str, value: str) -> str:
    """What a format is called whose codecs have these names: `int8` if both have that, `k8v4` for int8 and int4."""
    return key if key == value else f"k{key.removeprefix('int')}v{value.removeprefix('int')}"


def formats_of_pair(name: str, formats: Iterable[F]) -> tuple[F, F] | None:
    """What a name as `pair_name` makes it stands for: a format with its codec of keys, and one with that of values.

    None: it is no such name.

    Raises:
        ValueError: a codec that there is not, or a pair that has another name.
    """
    if (found := re.fullmatch("k(.+)v(.+)", name)) is None:
        return None
    having: tuple[dict[str, F], dict[str, F]] = {}, {}
    for kv_format in formats:
        for known, codec in zip(having, kv_format.sides, strict=True):
            known.setdefault(codec.name.removeprefix("int"), kv_format)
    for short, known, side in zip(found.groups(), having, ("keys", "values"), strict=True):
        if short not in known:
            raise ValueError(f"KV precision {name!r}: no codec of {side} is called {short!r}; use {', '.join(known)}")
    of_keys, of_values = (known[short] for known, short in zip(having, found.groups(), strict=True))
    own = pair_name(of_keys.key.name, of_values.value.name)
    if own != name:
        raise ValueError(f"KV precision {name!r} is called {own!r}")
    return of_keys, of_values


FORMAT_SIZES: dict[str, FormatSizes] = {
    sizes.name: sizes
    for sizes in (
        *(FormatSizes(own, own) for own in (Float32Sizes(), BFloat16Sizes(), Float16Sizes())),
        *(FormatSizes(own, own) for own in (Int8Sizes(), Float8Sizes())),
        FormatSizes(Int4KeySizes(), Int4ValueSizes()),
    )
}
"""Of every registered format, by name: what is served unless somebody says otherwise."""
NAMED_SIZES: dict[str, FormatSizes] = {"int3": FormatSizes(Int3KeySizes(), Int3ValueSizes())}
"""Of formats that are served only where they are named, as pairs are."""


def get_format_sizes(name: str) -> FormatSizes:
    """The sizes of the format called `name`. Raises ValueError, naming those there are."""
    known = FORMAT_SIZES | NAMED_SIZES
    if name in known:
        return known[name]
    if (pair := formats_of_pair(name, known.values())) is None:
        raise ValueError(f"KV format {name!r} is not known; choose one of {', '.join(known)}, or a pair: k8v4")
    return FormatSizes(pair[0].key, pair[1].value)
