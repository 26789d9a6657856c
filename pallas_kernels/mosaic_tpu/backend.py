"""TPUs as a backend, through Pallas and Mosaic."""

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.backends import Backend
from fineserve_jax.pallas_kernels.chunk_attention import attend_within
from fineserve_jax.pallas_kernels.mosaic_tpu.attention_launch import TILING, attend_pages
from fineserve_jax.pallas_kernels.mosaic_tpu.page_writes import requantize, write_pages
from fineserve_jax.pallas_kernels.mosaic_tpu.token_writes import write_tokens


class MosaicTpuBackend:
    """Kernels that copy whole units between the arena and vector memory."""

    tiling = TILING
    query_dtype = jnp.dtype(jnp.bfloat16)
    tile_units = True
    writes_beside = False  # a page is read, changed and written back
    attend = staticmethod(attend_pages)
    attend_within = staticmethod(attend_within)
    write_tokens = staticmethod(write_tokens)
    write_pages = staticmethod(write_pages)
    requantize = staticmethod(requantize)


BACKEND: Backend = MosaicTpuBackend()
