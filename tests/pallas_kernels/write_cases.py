"""What the tests of writing kernels share: the same writes, by a kernel and by XLA, into the same arena of noise.

The whole arenas must be equal afterwards, so a kernel changes no word that it should not. XLA's own writes are tested
against the documented layout in test_arena_writes.py.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import ALL_FORMATS, FAR_AWAY, geometry_id

from fineserve_jax.pallas_kernels import operations
from fineserve_jax.pallas_kernels.formats import Codec, EncodedVectors, Granularity, KVFormat, PageWords, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.pallas_kernels.specs import WriteSpec

# Programs here run once, on little: compiling them is what takes time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
requantize = quick_jit(operations.requantize, static_argnums=(0, 1, 2))


@functools.partial(quick_jit, static_argnums=0)
def write_pages(spec, arena, words, pages):
    """All of them in the spec's only format."""
    return operations.write_pages(spec, arena, {0: words}, pages, jnp.zeros_like(pages))


@functools.partial(quick_jit, static_argnums=0)
def write_tokens(spec, arena, words, pages, offsets):
    """All of them in the spec's only format."""
    return operations.write_tokens(spec, arena, {0: words}, pages, offsets, jnp.zeros_like(pages))


TOKEN_PAIR = get_format("kbf16v8")  # whose keys and values differ in length
TOKEN_FORMATS = [kv_format for kv_format in (*ALL_FORMATS.values(), TOKEN_PAIR) if kv_format.residual is None]
KERNEL_PAGES = 6
NUM_PLACES = 14  # where pages fit into an arena

# Formats whose rotations differ: products are summed in another order, and a value may get the next code.
ROTATING = [("bf16", "int4"), ("int8", "int4"), ("bf16", "k8v4")]
SAME_ROTATION = [("bf16", "int8"), ("fp32", "bf16"), ("int8", "bf16"), ("fp8", "fp32")]
MOST_DIFFERENT_WORDS = 0.002
BF16_STEP = 2.0**-7
SUM_ERROR = 1e-6  # of f32 sums over channels, relative to the largest value


def format_cases(formats: Sequence[KVFormat], geometries: Sequence[PageGeometry]) -> pytest.MarkDecorator:
    """Every format in some geometry, and int8 in all of them."""
    cases = [(kv_format, geometries[i % len(geometries)]) for i, kv_format in enumerate(formats)]
    cases += [(get_format("int8"), geometry) for geometry in geometries if (get_format("int8"), geometry) not in cases]
    names = [f"{kv_format.name}-{geometry_id(geometry)}" for kv_format, geometry in cases]
    return pytest.mark.parametrize(("kv_format", "geometry"), cases, ids=names)


def pair_cases(pairs: Sequence[tuple[str, str]], geometries: Sequence[PageGeometry]) -> pytest.MarkDecorator:
    """Every pair of formats in some geometry."""
    cases = [(get_format(a), get_format(b), geometries[i % len(geometries)]) for i, (a, b) in enumerate(pairs)]
    names = [f"{a.name}-{b.name}-{geometry_id(geometry)}" for a, b, geometry in cases]
    return pytest.mark.parametrize(("source", "target", "geometry"), cases, ids=names)


class Arena:
    """Noise, and places for pages of the format that takes most room; the last place ends with the arena."""

    def __init__(self, geometry: PageGeometry, seed: int = 0) -> None:
        self.geometry, self.rng = geometry, np.random.default_rng(seed)
        longest = get_format("fp32").page_units(geometry)
        self.noise = self.rng.integers(0, 2**16, (NUM_PLACES * longest, *geometry.unit_shape), np.uint16)
        self.places = np.arange(NUM_PLACES, dtype=np.int32) * longest

    def __len__(self) -> int:
        return len(self.noise)

    def pages(self, kv_format: KVFormat) -> np.ndarray:
        """Six pages: at both ends, in between, and two beyond the arena."""
        return np.array([len(self), *self.places[[0, 7, 3]], FAR_AWAY, self.last(kv_format)], np.int32)

    def last(self, kv_format: KVFormat) -> int:
        return len(self) - kv_format.page_units(self.geometry)

    def words(self, kv_format: KVFormat, num_tokens: int) -> PageWords:
        """Any bits, as words of pages of so many tokens."""
        geometry = self.geometry
        leading = (geometry.num_layers, geometry.kv_heads, KERNEL_PAGES)

        def part(*shape: int) -> np.ndarray:
            return self.rng.integers(0, 2**16, leading + shape, np.uint16)

        def side(codec: Codec) -> EncodedVectors:
            width = codec.width(geometry)
            shapes = {Granularity.TOKEN: (num_tokens, 1), Granularity.CHANNEL: (1, width), Granularity.PAGE: (1, 1)}
            words = tuple(part(num_tokens, width) for _ in range(codec.word_parts))
            return EncodedVectors(words, tuple(part(*shapes[kind]) for kind in codec.scales))

        return PageWords(*map(side, kv_format.sides))


def check_write_pages(implementation: Implementation, kv_format: KVFormat, geometry: PageGeometry) -> None:
    arena = Arena(geometry)
    args = arena.noise, arena.words(kv_format, geometry.page_size), arena.pages(kv_format)
    specs = (WriteSpec(geometry, (kv_format,), name) for name in (implementation, "xla"))
    after, expected = (write_pages(spec, *args) for spec in specs)
    np.testing.assert_array_equal(after, expected)


def check_write_tokens(
    implementation: Implementation,
    kv_format: KVFormat,
    geometry: PageGeometry,
    pages: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
) -> None:
    """Tokens at both ends of a page and in between, unless said where."""
    arena = Arena(geometry)
    if pages is None or offsets is None:
        last = geometry.page_size - 1
        pages, offsets = arena.pages(kv_format), [1, last, 0, last // 2, 2, 5]
    places = np.array(pages, np.int32), np.array(offsets, np.int32)
    args = arena.noise, arena.words(kv_format, 1), *places
    specs = (WriteSpec(geometry, (kv_format,), name) for name in (implementation, "xla"))
    after, expected = (write_tokens(spec, *args) for spec in specs)
    np.testing.assert_array_equal(after, expected)


class Requantized:
    """Pages of normal numbers converted by a kernel and by XLA.

    Attributes:
        found, expected: the arenas afterwards, u16[num_units, ...].
        written: bool, of the same shape: which words belong to target pages.
    """

    def __init__(
        self,
        implementation: Implementation,
        source: KVFormat,
        target: KVFormat,
        geometry: PageGeometry,
        count: int = KERNEL_PAGES,
    ) -> None:
        arena = Arena(geometry)
        shape = (geometry.num_layers, geometry.kv_heads, KERNEL_PAGES, geometry.page_size, geometry.head_dim)
        k, v = (arena.rng.standard_normal(shape, np.float32) for _ in "kv")
        k[..., 3] += 20  # a channel far from the others, as keys have them
        sources = arena.places[[9, 2, 5, 11, 4, 1]]
        targets = arena.pages(target)
        words = quick_jit(source.encode_vectors)(k, v)
        before = write_pages(WriteSpec(geometry, (source,), "xla"), arena.noise, words, sources)
        specs = (WriteSpec(geometry, (source, target), name) for name in (implementation, "xla"))
        self.found, self.expected = (
            np.asarray(requantize(spec, source, target, before, sources, targets, np.int32(count))) for spec in specs
        )
        self.written = np.zeros(self.found.shape, bool)
        for page in targets[:count]:
            self.written[page : page + target.page_units(geometry)] = page < len(arena)


def check_equal(result: Requantized) -> None:
    np.testing.assert_array_equal(result.found, result.expected)


def check_nearly_equal(result: Requantized, digit_bits: int) -> None:
    """Few words differ, each of their digits by at most one; outside of the target pages none does."""
    differ = result.found != result.expected
    assert not differ[~result.written].any()
    assert differ[result.written].mean() < MOST_DIFFERENT_WORDS
    found, expected = (words[differ].astype(np.int32) for words in (result.found, result.expected))
    for shift in range(0, 16, digit_bits):
        difference = (found >> shift) - (expected >> shift) & (1 << digit_bits) - 1
        assert set(difference) <= {0, 1, (1 << digit_bits) - 1}


def check_bf16_nearly_equal(result: Requantized) -> None:
    """Values differ by no more than the last bit and what sums in another order do."""
    np.testing.assert_array_equal(result.found[~result.written], result.expected[~result.written])
    found, expected = (
        (words[result.written].astype(np.uint32) << 16).view(np.float32) for words in (result.found, result.expected)
    )
    np.testing.assert_allclose(found, expected, rtol=BF16_STEP, atol=SUM_ERROR * np.abs(expected).max())
