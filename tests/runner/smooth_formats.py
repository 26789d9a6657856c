"""KV formats for tests, which distort strongly but without rounding.

Rounding turns the last bit of a float32 sum, which any change of batch or shape may flip, into a whole quantisation
step now and then; comparisons of quantised formats have to allow for that. These two distort far more than any
quantisation does, and yet smoothly, so that what they give can be compared to the last bits: who sees which form of
which token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np

from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES
from fineserve_jax.pallas_kernels.formats import FORMATS, KVFormat, register
from fineserve_jax.pallas_kernels.formats.wide import Float32Codec


class Bent(Float32Codec):
    """Token-wise: a nonlinear function of each number."""

    name = "bent"

    def __init__(self, bend):
        self.bend = bend

    def encode(self, lanes):
        return super().encode((lanes[0] + 0.5 * self.bend(2 * lanes[0]),))


class Woven(Float32Codec):
    """Page-wise: each token takes something from the others of its page; vectors are rotated in a way of its own.

    (Means over a page are for XLA alone: kernels know minima and maxima.)
    """

    name = "woven"
    residual = "bent"

    def encode(self, lanes):
        return super().encode((lanes[0] - 0.7 * lanes[0].mean(axis=-2, keepdims=True),))

    def rotation(self, head_dim):
        """Moves every channel five places on."""
        return np.roll(np.eye(head_dim, dtype=np.float32), 5, axis=-1)


@contextmanager
def smooth_formats() -> Iterator[tuple[str, ...]]:
    """Registers both; gives their names."""
    added = (register(KVFormat(Bent(jnp.sin), Bent(jnp.cos))), register(KVFormat(Woven(), Woven())))
    try:
        yield tuple(kv_format.name for kv_format in added)
    finally:
        for kv_format in added:
            del FORMATS[kv_format.name], FORMAT_SIZES[kv_format.name]
