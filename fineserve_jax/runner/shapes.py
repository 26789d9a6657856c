"""The static side of a step: what a compiled program is specialised for, and which sizes there are."""

from dataclasses import dataclass

from fineserve_jax.models import CausalLM
from fineserve_jax.pallas_kernels.formats import KVFormat, TokenFormat, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.xla.tiles import TileShape

# XLA's CPU products of bf16 and int8 are several times slower with fewer rows than this.
MIN_ROWS = 8
# A tile's keys and values should stay in a core's cache: 16 rows of 64 tokens, or one row of 256.
DECODE_TILE = (16, 4)
CHUNK_TILE = (1, 16)


@dataclass(frozen=True)
class StepShape:
    """Slots of a step, all padded: one program is compiled for each shape that occurs.

    Attributes:
        rows: slots for tokens that are decoded, and for tokens that are sampled.
        chunk_tokens: slots for prefill chunks, a multiple of the page size; 0 for a step that only decodes.
    """

    rows: int
    chunk_tokens: int


@dataclass(frozen=True)
class StepSpec:
    """All that is static for `jit` in a step.

    Attributes:
        model: the Flax module; its parameters are an argument of the step.
        geometry: of the model's pages.
        format_names: KV formats the step reads and writes; format ids are indices into it. A format's tail is in it.
        shape: slots of the step.
        max_pages: pages of the longest sequence.
    """

    model: CausalLM
    geometry: PageGeometry
    format_names: tuple[str, ...]
    shape: StepShape
    max_pages: int

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        return tuple(get_format(name) for name in self.format_names)

    def tail_of(self, kv_format: KVFormat) -> KVFormat:
        """The format of the newest tokens of requests in a page-wise format."""
        return next(tail for tail in self.formats if tail.name == kv_format.tail)

    @property
    def token_formats(self) -> dict[int, TokenFormat]:
        """Format id -> format, of those that encode token by token."""
        return {i: f for i, f in enumerate(self.formats) if isinstance(f, TokenFormat)}

    @property
    def paged_formats(self) -> dict[int, KVFormat]:
        """Format id -> format, of those that encode whole pages."""
        return {i: f for i, f in enumerate(self.formats) if not isinstance(f, TokenFormat)}

    @property
    def chunk_pages(self) -> int:
        return self.shape.chunk_tokens // self.geometry.page_size

    @property
    def decode_tiles(self) -> TileShape:
        rows, pages = DECODE_TILE
        return self._tiles(self.shape.rows, min(rows, self.shape.rows), pages)

    @property
    def chunk_tiles(self) -> TileShape:
        return self._tiles(self.chunk_pages, *CHUNK_TILE)

    def _tiles(self, num_rows: int, rows: int, pages: int) -> TileShape:
        return TileShape(
            num_rows=num_rows,
            max_pages=self.max_pages,
            rows=rows,
            pages=pages,
            num_formats=len(self.format_names),
            segments_per_row=2 if self.paged_formats else 1,
        )


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Powers of two from `MIN_ROWS` until they hold `max_rows`."""
    buckets = [MIN_ROWS]
    while buckets[-1] < max_rows:
        buckets.append(2 * buckets[-1])
    return tuple(buckets)


def chunk_buckets(max_chunk_tokens: int, page_size: int) -> tuple[int, ...]:
    """Sizes that chunks are padded to: `max_chunk_tokens`, and quarters of it down to about 64 tokens."""
    buckets = [max_chunk_tokens]
    while buckets[0] >= 256 and buckets[0] % (4 * page_size) == 0:
        buckets.insert(0, buckets[0] // 4)
    return tuple(buckets)


def pick(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)
