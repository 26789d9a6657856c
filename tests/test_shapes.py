"""The shapes that annotations state are checked, at least while the tests run (see conftest.py)."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from fineserve_jax.models.rope import apply_rope
from fineserve_jax.models.weight_formats import WEIGHT_RECIPES


def test_dimensions_of_one_name_are_of_one_length():
    with pytest.raises(TypeCheckError, match="N 1 half_dim"):
        apply_rope(jnp.zeros((3, 2, 8)), jnp.zeros((3, 1, 4)), jnp.zeros((4, 1, 4)))


def test_other_dtypes_are_refused():
    fmt = WEIGHT_RECIPES["fp32"].linear
    with pytest.raises(TypeCheckError, match="Int32"):
        fmt.rows({"kernel": jnp.zeros((8, 4))}, jnp.zeros(2, jnp.float32))
