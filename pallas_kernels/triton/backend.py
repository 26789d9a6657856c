"""NVIDIA GPUs as a backend, through Pallas and Triton."""

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.backends import Backend
from fineserve_jax.pallas_kernels.chunk_attention import attend_within
from fineserve_jax.pallas_kernels.triton.attention_launch import attend_pages
from fineserve_jax.pallas_kernels.triton.requantize_kernel import requantize
from fineserve_jax.pallas_kernels.triton.tiling import TILING
from fineserve_jax.pallas_kernels.triton.write_kernel import write_pages, write_tokens


class TritonBackend:
    """Kernels that load and store words where they lie in the arena."""

    tiling = TILING
    query_dtype = jnp.dtype(jnp.bfloat16)
    tile_units = False
    writes_beside = True
    attend = staticmethod(attend_pages)
    attend_within = staticmethod(attend_within)
    write_tokens = staticmethod(write_tokens)
    write_pages = staticmethod(write_pages)
    requantize = staticmethod(requantize)


BACKEND: Backend = TritonBackend()
