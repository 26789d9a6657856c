"""KV formats for tests, which distort strongly but without rounding.

Rounding turns the last bit of a float32 sum, which any change of batch or shape may flip, into a whole quantisation
step now and then; comparisons of quantised formats have to allow for that. These two distort far more than any
quantisation does, and yet smoothly, so that what they give can be compared to the last bits: who sees which form of
which token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import FORMATS, KVFormat, PageWords, register
from fineserve_jax.pallas_kernels.formats.wide import Float32


class Bent(Float32):
    """Token-wise: a nonlinear function of each number."""

    name = "bent"

    def encode(self, geometry, k, v):
        return super().encode(geometry, k + 0.5 * jnp.sin(2 * k), v + 0.5 * jnp.cos(2 * v))


class Woven(KVFormat):
    """Page-wise: each token takes something from the others of its page; vectors are kept in a basis of its own."""

    name = "woven"
    value_bits = 32
    tail = "bent"
    _wide = Float32()

    def aux_words(self, geometry):
        return 0

    def encode(self, geometry, k, v):
        k, v = (part - 0.7 * part.mean(axis=-2, keepdims=True) for part in (k, v))
        return self._wide.encode(geometry, self.to_basis(k), self.to_basis(v))

    def unpack(self, geometry, words: PageWords):
        return self._wide.unpack(geometry, words)

    def to_basis(self, vectors):
        return jnp.roll(vectors, 5, axis=-1)

    def from_basis(self, vectors):
        return jnp.roll(vectors, -5, axis=-1)


@contextmanager
def smooth_formats() -> Iterator[tuple[str, ...]]:
    """Registers both; gives their names."""
    added = (register(Bent()), register(Woven()))
    try:
        yield tuple(kv_format.name for kv_format in added)
    finally:
        for kv_format in added:
            del FORMATS[kv_format.name]
