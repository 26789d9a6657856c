"""Products of activations with stored matrices by the compiled kernels, which read each weight once.

Matrices lie `[out, in]`, as XLA multiplies them too, so both use the same copy. `src/products.h` has the code.
"""

import jax
import jax.numpy as jnp


def multiply_bf16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """f32[N, in], rounded to bf16, times bf16[out, in] transposed, with sums in f32: f32[N, out]."""
    return _call("fineserve_multiply_bf16", x, kernel)


def multiply_int8(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """f32[N, in], each row quantised to 127 steps to either side of 0, times i8[out, in] transposed with sums in i32,
    times the rows' steps and f32[out] scales: f32[N, out]."""
    return _call("fineserve_multiply_int8", x, kernel, scale)


def multiply_int4(x: jax.Array, kernel: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """f32[N, in], rounded to bf16, times a matrix of 4-bit codes transposed, with sums in f32: f32[N, out].

    Args:
        kernel: u8[out, in / 2], byte w = code[w] | code[w + in / 2] << 4.
        scale, minimum: f16[out, in / 32], of each 32 consecutive inputs: code * scale + minimum, rounded to bf16.
    """
    return _call("fineserve_multiply_int4", x, kernel, scale, minimum)


def _call(target: str, x: jax.Array, kernel: jax.Array, *more: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target, result)(x, kernel, *more)
