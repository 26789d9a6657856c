"""How Triton kernels multiply matrices of f32, and take them in pieces so small that they fit in registers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def exact_product(*, interpret: bool) -> Any:
    """The `precision` of a product whose f32 operands are not to be rounded.

    Tensor cores take 11 bits of mantissa. Three products of operands cut in two such halves leave an error of about
    2**-21 of each term, and take far fewer registers than f32 without tensor cores does.
    """
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def pick(pieces: Sequence[jax.Array], number: jax.Array) -> jax.Array:
    """The piece with that number, which a loop counts: compilers then keep one piece's products at a time."""
    return functools.reduce(lambda left, i: jnp.where(number < i, left, pieces[i]), range(1, len(pieces)), pieces[0])
