"""The distinct rotations of a program's formats: vectors that several formats keep alike are rotated once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.pallas_kernels.formats import KVFormat


class Rotations:
    """Distinct rotations of some formats; no rotation counts as one.

    Attributes:
        of_format: of each format, the number of the rotation in which it keeps its vectors.
    """

    def __init__(self, formats: Sequence[KVFormat], head_dim: int) -> None:
        matrices: list[np.ndarray | None] = []
        self._examples: list[KVFormat] = []  # one format of each rotation
        of_format = []
        for kv_format in formats:
            matrix = kv_format.rotation(head_dim)
            number = next((i for i, known in enumerate(matrices) if _same(known, matrix)), len(matrices))
            if number == len(matrices):
                matrices.append(matrix)
                self._examples.append(kv_format)
            of_format.append(number)
        self.of_format = tuple(of_format)

    def __len__(self) -> int:
        return len(self._examples)

    def rotate(self, vectors: jax.Array) -> jax.Array:
        """[..., head_dim] vectors of the model in every rotation: [rotations, ..., head_dim], of the same dtype."""
        exact = vectors.astype(jnp.float32)
        return jnp.stack([example.rotate(exact).astype(vectors.dtype) for example in self._examples])

    def unrotate(self, vectors: jax.Array, number: int) -> jax.Array:
        """f32[..., head_dim] vectors in one of the rotations, as vectors of the model."""
        return self._examples[number].unrotate(vectors)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
