"""The bases in which a program's formats keep their vectors: one for each distinct rotation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.pallas_kernels.formats import KVFormat


class Bases:
    """Distinct rotations of some formats.

    Attributes:
        index: of each format, the basis it keeps its vectors in.
    """

    def __init__(self, formats: Sequence[KVFormat], head_dim: int) -> None:
        rotations: list[np.ndarray | None] = []
        self._examples: list[KVFormat] = []  # one format of each basis
        index = []
        for kv_format in formats:
            rotation = kv_format.rotation(head_dim)
            basis = next((i for i, known in enumerate(rotations) if _same(known, rotation)), len(rotations))
            if basis == len(rotations):
                rotations.append(rotation)
                self._examples.append(kv_format)
            index.append(basis)
        self.index = tuple(index)

    def __len__(self) -> int:
        return len(self._examples)

    def rotate(self, vectors: jax.Array) -> jax.Array:
        """[..., head_dim] vectors of the model's basis in every basis: [bases, ..., head_dim], of the same dtype."""
        exact = vectors.astype(jnp.float32)
        return jnp.stack([example.to_basis(exact).astype(vectors.dtype) for example in self._examples])

    def restore(self, vectors: jax.Array, basis: int) -> jax.Array:
        """f32[..., head_dim] vectors of one basis in the model's."""
        return self._examples[basis].from_basis(vectors)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
