"""What is static of attention and of writing: a program is compiled for each spec."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import (
    Implementation,
    check_implementation,
    default_implementation,
    is_interpreted,
)


@dataclass(frozen=True)
class AttentionSpec:
    """All that is static of an attention.

    Attributes:
        geometry: of the pages.
        formats: what the segments' format ids mean.
        num_rows: rows of the batch.
        max_pages: pages of the longest segment there can be.
        num_queries: length of the query axis; None: one a row, query r for row r (decoding).
        segments_per_row: most segments a row has.
        window: a query sees keys less than this many positions back; None: all before it.
        packs: whether a tile may hold KV splits of several rows; if not, a row's sums are taken as if it were alone.
        soft_cap: logits are capped to soft_cap * tanh(logit / soft_cap); None: not.
        implementation: xla, cpu, triton or mosaic_tpu.
        interpret: run Pallas kernels in Python and XLA, on any platform; None: if this platform cannot compile them.
    """

    geometry: PageGeometry
    formats: tuple[KVFormat, ...]
    num_rows: int
    max_pages: int
    num_queries: int | None = None
    segments_per_row: int = 1
    window: int | None = None
    soft_cap: float | None = None
    packs: bool = True
    implementation: Implementation = field(default_factory=default_implementation)
    interpret: bool | None = None

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} hides every key; use at least 1, or None for no window")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(f"soft_cap={self.soft_cap} is no positive number; use None for no cap")
        if self.interpret is None:
            object.__setattr__(self, "interpret", is_interpreted(self.implementation))

    @property
    def decodes(self) -> bool:
        """Whether every row has one query."""
        return self.num_queries is None

    @property
    def query_axis_size(self) -> int:
        """Length of the query axis."""
        return self.num_rows if self.num_queries is None else self.num_queries


@dataclass(frozen=True)
class WriteSpec:
    """All that is static of writing pages and tokens.

    Attributes:
        geometry: of the pages.
        formats: what format ids mean.
        implementation: xla, cpu, triton or mosaic_tpu.
        interpret: run Pallas kernels in Python and XLA, on any platform; None: if this platform cannot compile them.
    """

    geometry: PageGeometry
    formats: tuple[KVFormat, ...]
    implementation: Implementation = field(default_factory=default_implementation)
    interpret: bool | None = None

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if self.interpret is None:
            object.__setattr__(self, "interpret", is_interpreted(self.implementation))

    def encode_pages(self, k: jax.Array, v: jax.Array) -> dict[int, PageWords]:
        """The words of whole pages in every format, by format id.

        Args:
            k, v: f32 or bf16[layers, kv_heads, pages, T, head_dim].
        """
        return self._encode(k.astype(jnp.float32), v.astype(jnp.float32))

    def encode_tokens(self, k: jax.Array, v: jax.Array) -> dict[int, PageWords]:
        """The words of single tokens, as pages of one token, in every format, by format id.

        Args:
            k, v: f32 or bf16[layers, kv_heads, N, head_dim].
        """
        return self._encode(*(part.astype(jnp.float32)[..., None, :] for part in (k, v)))

    def _encode(self, k: jax.Array, v: jax.Array) -> dict[int, PageWords]:
        return {i: kv_format.encode_vectors(k, v) for i, kv_format in enumerate(self.formats)}
