"""The backends: what runs the operations, each an object that is found by its implementation's name.

A new one is a package with a module `backend`, a line in `BACKENDS`, and its name in `implementation`.
"""

import importlib
from typing import Protocol

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec, WriteSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.tiling import Tiling


class Backend(Protocol):
    """One implementation of all operations. Every array function is pure, to be called inside `jit`."""

    @property
    def tiling(self) -> Tiling:
        """How batches are cut for `attend`."""

    @property
    def query_dtype(self) -> jnp.dtype:
        """What to give queries in where f32 is not asked for: `attend` takes products at their precision."""

    @property
    def tile_units(self) -> bool:
        """Whether the arena's units must be TPU tiles: see `choose_unit_words`."""

    @property
    def writes_beside(self) -> bool:
        """Whether `write_tokens` may write several tokens of one page at once."""

    def attend(
        self, spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
    ) -> PartialAttention:
        """Attention of each query to its row's cached tokens.

        Args:
            q: f32 or bf16[num_queries, kv_heads, group, head_dim], already multiplied by the softmax scale.
            arena: u16[num_units, *unit_shape].
            tiles: of the shape that `tiling` gives.
            layer: i32[].

        Returns:
            of f32[num_queries, kv_heads, group].
        """

    def attend_within(
        self,
        q: jax.Array,
        own_page: tuple[jax.Array, jax.Array],
        earlier_pages: tuple[jax.Array, jax.Array],
        chunk_of_page: jax.Array,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> PartialAttention:
        """Causal attention of each chunk's tokens to themselves: see `chunk_attention.attend_within`."""

    def write_tokens(
        self,
        spec: WriteSpec,
        kv_format: KVFormat,
        arena: jax.Array,
        words: PageWords,
        pages: jax.Array,
        offsets: jax.Array,
    ) -> jax.Array:
        """Writes one token into each of N pages of a token-wise format; returns the arena.

        Args:
            words: of pages of one token: u16[layers, kv_heads, N, 1, width], scales of
                u16[layers, kv_heads, N, 1, 1].
            pages: i32[N], first units; unless the backend `writes_beside` no two the same but those beyond the arena,
                which are dropped.
            offsets: i32[N], each token's place in its page.
        """

    def write_pages(
        self, spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array
    ) -> jax.Array:
        """Writes whole pages, all layers; what pads them becomes 0. Returns the arena.

        Args:
            words: u16[layers, kv_heads, pages, T, width], scales of u16[layers, kv_heads, pages, ...].
            pages: i32[pages], first units; those beyond the arena are dropped.
        """

    def requantize(
        self,
        spec: WriteSpec,
        source: KVFormat,
        target: KVFormat,
        arena: jax.Array,
        sources: jax.Array,
        targets: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        """Reads full pages in one format and writes what they hold to others in another; returns the arena.

        Args:
            sources, targets: i32[N], first units. No target overlaps a source.
            count: i32[], how many of them count.
        """


BACKENDS: dict[Implementation, str] = {
    "xla": "fineserve_jax.pallas_kernels.xla.backend",
    "cpu": "fineserve_jax.pallas_kernels.cpu.backend",
    "triton": "fineserve_jax.pallas_kernels.triton.backend",
    "mosaic_tpu": "fineserve_jax.pallas_kernels.mosaic_tpu.backend",
}
"""Of each implementation, the module whose `BACKEND` it is. Imported when first asked for: Pallas takes a second."""


def get_backend(implementation: Implementation) -> Backend:
    """The backend of that name."""
    backend: Backend = importlib.import_module(BACKENDS[implementation]).BACKEND
    return backend
