"""XLA as a backend: any platform, the default on CPUs, and what the kernels are compared with."""

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.backends import Backend
from fineserve_jax.pallas_kernels.chunk_attention import attend_within
from fineserve_jax.pallas_kernels.xla.attention_loop import TILING, attend_pages
from fineserve_jax.pallas_kernels.xla.page_scatter import requantize, write_pages, write_tokens


class XlaBackend:
    """Loops over tiles, gathers and scatters."""

    tiling = TILING
    query_dtype = jnp.dtype(jnp.float32)  # products are of f32 anyway
    tile_units = False
    writes_beside = True
    attend = staticmethod(attend_pages)
    attend_within = staticmethod(attend_within)
    write_tokens = staticmethod(write_tokens)
    write_pages = staticmethod(write_pages)
    requantize = staticmethod(requantize)


BACKEND: Backend = XlaBackend()
