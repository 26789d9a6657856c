"""The arena: the one array that holds the pages of all models and formats."""

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.geometry import PageGeometry

NOWHERE = 2**30
"""A first unit beyond any arena, all layers counted: what is written there is dropped."""


def new_arena(geometry: PageGeometry, num_units: int) -> jax.Array:
    """An empty arena, u16[num_units, *unit_shape]. Unit 0 is the null page that padding points at."""
    return jnp.zeros((num_units, *geometry.unit_shape), jnp.uint16)
