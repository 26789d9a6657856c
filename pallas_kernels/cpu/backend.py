"""CPUs as a backend, through kernels that are compiled when the package is installed."""

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.backends import Backend
from fineserve_jax.pallas_kernels.cpu.attention import attend_pages, attend_within
from fineserve_jax.pallas_kernels.xla.attention_loop import TILING
from fineserve_jax.pallas_kernels.xla.page_scatter import requantize, write_pages, write_tokens


class CpuBackend:
    """Attention compiled; what writes the arena is XLA's."""

    tiling = TILING
    query_dtype = jnp.dtype(jnp.float32)  # products are of f32 anyway
    tile_units = False
    writes_beside = True
    attend = staticmethod(attend_pages)
    attend_within = staticmethod(attend_within)
    write_tokens = staticmethod(write_tokens)
    write_pages = staticmethod(write_pages)
    requantize = staticmethod(requantize)


BACKEND: Backend = CpuBackend()
