"""Weight formats: how a matrix `[out, in]` is stored and multiplied.

A new one is a class and an entry of `WEIGHT_RECIPES`. Every product contracts the last axis of both
operands, which XLA's CPU backend multiplies without repacking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float32 as F32
from jaxtyping import Int32

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.product_choice import uses_compiled
from fineserve_jax.pallas_kernels.cpu.products import multiply_bf16, multiply_int4, multiply_int8

INT4_GROUP = 32  # values along `in` that share a scale and a minimum
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_GROUPED = lax.RaggedDotDimensionNumbers(  # [N, in] in groups times [groups, out, in]
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)

Arrays = Mapping[str, jax.Array]
HostArrays = Mapping[str, np.ndarray]
Vectors = F32[jax.Array, "N inner"]
Products = F32[jax.Array, "N out"]
Shapes = dict[str, jax.ShapeDtypeStruct]


@runtime_checkable
class WeightFormat(Protocol):
    """One way to store a matrix. Instances are hashable: they are fields of Flax modules."""

    def declare(self, out: int, inner: int) -> Shapes:
        """Names, shapes and dtypes of the stored arrays of a matrix `[out, inner]`."""

    def pack(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Encode f32[out, in] on the host."""

    def dot(self, stored: Arrays, x: Vectors) -> Products:
        """x f32[N, in] times the matrix transposed, f32[N, out]."""

    def rows(self, stored: Arrays, ids: Int32[jax.Array, " N"]) -> Vectors:
        """Rows `ids` i32[N] of the matrix, f32[N, in]: the embedding look-up."""

    def columns(self, stored: HostArrays, columns: slice) -> dict[str, np.ndarray]:
        """The stored arrays of some columns of a matrix, as many as `declare` takes; on the host."""


@runtime_checkable
class GroupedWeightFormat(WeightFormat, Protocol):
    """One whose products with the matrices of several groups are one operation."""

    def grouped_dot(
        self, stored: Arrays, x: Vectors, sizes: Int32[jax.Array, " groups"], groups: Int32[jax.Array, " N"]
    ) -> Products:
        """x f32[N, in], sorted by group, times each row's group's matrix transposed, f32[N, out].

        stored: the arrays of all groups' matrices, stacked. sizes: rows of each group. groups: of each row.
        """


@dataclasses.dataclass(frozen=True)
class Float32Weights:
    """`kernel` f32[out, in]; products in full float32, also where TensorFloat-32 would be the default."""

    def declare(self, out: int, inner: int) -> Shapes:
        return {"kernel": jax.ShapeDtypeStruct((out, inner), jnp.float32)}

    def pack(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": np.ascontiguousarray(matrix, np.float32)}

    def dot(self, stored: Arrays, x: Vectors) -> Products:
        return lax.dot_general(x, stored["kernel"], _CONTRACT_LAST, precision=lax.Precision.HIGHEST)

    def grouped_dot(self, stored: Arrays, x: Vectors, sizes: jax.Array, groups: jax.Array) -> Products:
        return lax.ragged_dot_general(x, stored["kernel"], sizes, _GROUPED, precision=lax.Precision.HIGHEST)

    def rows(self, stored: Arrays, ids: Int32[jax.Array, " N"]) -> Vectors:
        return jnp.take(stored["kernel"], ids, axis=0)

    def columns(self, stored: HostArrays, columns: slice) -> dict[str, np.ndarray]:
        return {"kernel": stored["kernel"][:, columns]}


@dataclasses.dataclass(frozen=True)
class BFloat16Weights:
    """`kernel` bf16[out, in]; activations rounded to bf16, sums in f32."""

    def declare(self, out: int, inner: int) -> Shapes:
        return {"kernel": jax.ShapeDtypeStruct((out, inner), jnp.bfloat16)}

    def pack(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": matrix.astype(jnp.bfloat16)}

    def dot(self, stored: Arrays, x: Vectors) -> Products:
        def plain(x: jax.Array, stored: Arrays) -> jax.Array:
            return _bf16_dot(x.astype(jnp.bfloat16), stored["kernel"])

        return _compiled_or("bf16", multiply_bf16, plain, x, stored)

    def grouped_dot(self, stored: Arrays, x: Vectors, sizes: jax.Array, groups: jax.Array) -> Products:
        return _grouped_bf16_dot(x.astype(jnp.bfloat16), stored["kernel"], sizes)

    def rows(self, stored: Arrays, ids: Int32[jax.Array, " N"]) -> Vectors:
        return jnp.take(stored["kernel"], ids, axis=0).astype(jnp.float32)

    def columns(self, stored: HostArrays, columns: slice) -> dict[str, np.ndarray]:
        return {"kernel": stored["kernel"][:, columns]}


@dataclasses.dataclass(frozen=True)
class Int8Weights:
    """W8A8: `kernel` i8[out, in], `scale` f32[out]; activations quantised per token, products in i32."""

    def declare(self, out: int, inner: int) -> Shapes:
        return {
            "kernel": jax.ShapeDtypeStruct((out, inner), jnp.int8),
            "scale": jax.ShapeDtypeStruct((out,), jnp.float32),
        }

    def pack(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        top = np.maximum(np.abs(matrix).max(axis=1), np.finfo(np.float32).tiny * 127)
        kernel = np.rint(matrix * (127.0 / top)[:, None]).clip(-127, 127).astype(np.int8)
        return {"kernel": kernel, "scale": (top / 127.0).astype(np.float32)}

    def dot(self, stored: Arrays, x: Vectors) -> Products:
        def plain(x: jax.Array, stored: Arrays) -> jax.Array:
            codes, scale = _int8_codes(x)
            sums = lax.dot_general(codes, stored["kernel"], _CONTRACT_LAST, preferred_element_type=jnp.int32)
            return sums.astype(jnp.float32) * scale * stored["scale"]

        return _compiled_or("int8", multiply_int8, plain, x, stored)

    def grouped_dot(self, stored: Arrays, x: Vectors, sizes: jax.Array, groups: jax.Array) -> Products:
        codes, scale = _int8_codes(x)
        sums = lax.ragged_dot_general(codes, stored["kernel"], sizes, _GROUPED, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * scale * stored["scale"][groups]

    def rows(self, stored: Arrays, ids: Int32[jax.Array, " N"]) -> Vectors:
        codes = jnp.take(stored["kernel"], ids, axis=0).astype(jnp.float32)
        return codes * jnp.take(stored["scale"], ids)[:, None]

    def columns(self, stored: HostArrays, columns: slice) -> dict[str, np.ndarray]:
        return {"kernel": stored["kernel"][:, columns], "scale": stored["scale"]}


@dataclasses.dataclass(frozen=True)
class Int4Weights:
    """Weight-only, 5 bits a value: `value = code * scale + minimum` with 4-bit codes, f16 scale and minimum.

    Codes are planar, so that each plane is one product and nothing is interleaved:

        kernel u8[out, in / 2]      byte w = code[w] | code[w + in / 2] << 4
        scale, minimum f16[out, in / 32]      one per group of 32 consecutive inputs
    """

    def declare(self, out: int, inner: int) -> Shapes:
        if inner % (2 * INT4_GROUP):
            raise ModelLoadError(
                f"weights='int4' needs input widths divisible by {2 * INT4_GROUP}, "
                f"this model has one of {inner}; use weights='int8'"
            )
        groups = jax.ShapeDtypeStruct((out, inner // INT4_GROUP), jnp.float16)
        return {
            "kernel": jax.ShapeDtypeStruct((out, inner // 2), jnp.uint8),
            "scale": groups,
            "minimum": groups,
        }

    def pack(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        out, inner = matrix.shape
        self.declare(out, inner)
        groups = matrix.reshape(out, -1, INT4_GROUP)
        minimum = groups.min(axis=2).astype(np.float16)
        scale = ((groups.max(axis=2) - minimum.astype(np.float32)) / 15.0).astype(np.float16)
        # A constant group has scale 0; any divisor gives its codes as 0, which decode to the minimum.
        divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
        codes = np.rint((groups - minimum.astype(np.float32)[:, :, None]) / divisor[:, :, None])
        return {"kernel": _two_planes(codes.clip(0, 15).astype(np.uint8)), "scale": scale, "minimum": minimum}

    def dot(self, stored: Arrays, x: Vectors) -> Products:
        def plain(x: jax.Array, stored: Arrays) -> jax.Array:
            halves = jnp.split(x.astype(jnp.bfloat16), 2, axis=-1)
            products = [_bf16_dot(half, plane) for half, plane in zip(halves, self._planes(stored), strict=True)]
            return products[0] + products[1]

        return _compiled_or("int4", multiply_int4, plain, x, stored)

    def rows(self, stored: Arrays, ids: Int32[jax.Array, " N"]) -> Vectors:
        taken = {name: jnp.take(array, ids, axis=0) for name, array in stored.items()}
        return jnp.concatenate(self._planes(taken), axis=-1).astype(jnp.float32)

    def columns(self, stored: HostArrays, columns: slice) -> dict[str, np.ndarray]:
        codes = np.concatenate([stored["kernel"] & 0xF, stored["kernel"] >> 4], axis=1)[:, columns]
        groups = slice(columns.start // INT4_GROUP, columns.stop // INT4_GROUP)
        return {"kernel": _two_planes(codes)} | {name: stored[name][:, groups] for name in ("scale", "minimum")}

    def _planes(self, stored: Arrays) -> list[jax.Array]:
        """The left and the right half of the matrix, bf16[out, in / 2] each."""
        codes = (stored["kernel"] & 0xF, stored["kernel"] >> 4)
        scales = jnp.split(stored["scale"].astype(jnp.float32), 2, axis=1)
        minima = jnp.split(stored["minimum"].astype(jnp.float32), 2, axis=1)
        planes = []
        for code, scale, minimum in zip(codes, scales, minima, strict=True):
            groups = code.reshape(code.shape[0], -1, INT4_GROUP).astype(jnp.float32)
            values = groups * scale[:, :, None] + minimum[:, :, None]
            planes.append(values.astype(jnp.bfloat16).reshape(code.shape))
        return planes


@dataclasses.dataclass(frozen=True)
class WeightRecipe:
    """Which format each kind of matrix takes; a tied table is stored once, in the head's format."""

    linear: WeightFormat
    embedding: WeightFormat
    head: WeightFormat


WEIGHT_RECIPES: dict[str, WeightRecipe] = {
    "fp32": WeightRecipe(Float32Weights(), Float32Weights(), Float32Weights()),
    "bf16": WeightRecipe(BFloat16Weights(), BFloat16Weights(), BFloat16Weights()),
    "int8": WeightRecipe(Int8Weights(), BFloat16Weights(), Int8Weights()),
    # The output head decides every token and 4 bits cost it most: keep it at 8.
    "int4": WeightRecipe(Int4Weights(), BFloat16Weights(), Int8Weights()),
}


def weight_recipe(weights: str) -> WeightRecipe:
    """The recipe called `weights`; raises ModelLoadError naming the known ones."""
    if weights not in WEIGHT_RECIPES:
        raise ModelLoadError(
            f"weights={weights!r} is not a known weight precision; choose one of {', '.join(WEIGHT_RECIPES)}"
        )
    return WEIGHT_RECIPES[weights]


def _two_planes(codes: np.ndarray) -> np.ndarray:
    """4-bit codes u8[out, in], or in groups, as `Int4Weights` keeps them, u8[out, in / 2]."""
    low, high = np.split(codes.reshape(len(codes), -1), 2, axis=1)
    return low | high << 4


def _compiled_or(
    kind: str,
    compiled: Callable[..., jax.Array],
    plain: Callable[[jax.Array, Arrays], jax.Array],
    x: jax.Array,
    stored: Arrays,
) -> jax.Array:
    """The compiled product where there is one for so many rows and the program is for a CPU, else XLA's."""
    arrays = dict(stored)
    if not uses_compiled(kind, len(x)):
        return plain(x, arrays)
    product: jax.Array = lax.platform_dependent(x, arrays, cpu=lambda x, arrays: compiled(x, **arrays), default=plain)
    return product


def _bf16_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, _CONTRACT_LAST, preferred_element_type=jnp.float32)


def _grouped_bf16_dot(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(x, kernels, sizes, _GROUPED, preferred_element_type=jnp.float32)


def _int8_codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows quantised to 8 bits, i8[N, in], and the scale of each, f32[N, 1]."""
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30)
    return jnp.clip(jnp.round(x * (127.0 / top)), -127, 127).astype(jnp.int8), top / 127.0
