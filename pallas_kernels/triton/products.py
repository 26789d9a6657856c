"""How Triton kernels multiply matrices of f32."""

from typing import Any

from jax import lax


def exact_product(*, interpret: bool) -> Any:
    """The `precision` of a product whose f32 operands are not to be rounded.

    Tensor cores take 11 bits of mantissa. Three products of operands cut in two such halves leave an error of about
    2**-21 of each term, and take far fewer registers than f32 without tensor cores does.
    """
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
