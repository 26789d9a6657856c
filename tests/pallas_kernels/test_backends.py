"""The table of backends, and what is imported when."""

import subprocess
import sys
from typing import get_args

import jax.numpy as jnp
import pytest

from fineserve_jax.pallas_kernels.backends import BACKENDS, get_backend
from fineserve_jax.pallas_kernels.implementation import Implementation

USES_XLA = """
import sys
import fineserve_jax.pallas_kernels as pk
import fineserve_jax.pallas_kernels.format_sizes
assert "jax" not in sys.modules
geometry = pk.PageGeometry(num_layers=1, kv_heads=1, head_dim=32, page_size=16, unit_words=128)
spec = pk.AttentionSpec(geometry, (pk.get_format("int8"),), num_rows=1, max_pages=1, implementation="xla")
pk.plan_attention(spec, [], [])
assert "jax" in sys.modules
kernels = [name for name in sys.modules if name.startswith(("jax.experimental.pallas", pk.__name__ + ".triton"))]
assert not kernels, kernels
"""


def test_every_implementation_has_a_backend():
    assert tuple(BACKENDS) == get_args(Implementation)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_says_how_it_cuts_batches_and_what_it_needs(name):
    backend = get_backend(name)
    assert backend is get_backend(name)
    assert backend.tiling.decode.queries == 1
    assert backend.query_dtype in (jnp.float32, jnp.bfloat16)
    assert backend.tile_units == (name == "mosaic_tpu")


def test_jax_is_imported_when_it_is_needed_and_kernels_when_their_backend_is():
    subprocess.run([sys.executable, "-c", USES_XLA], check=True)
