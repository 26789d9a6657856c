"""The distinct rotations of a program's codecs: vectors that several of them keep alike are rotated once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.pallas_kernels.formats import Codec


class Rotations:
    """Distinct rotations of some codecs; no rotation counts as one.

    Attributes:
        of_codec: of each codec, the number of the rotation in which it keeps its vectors.
    """

    def __init__(self, codecs: Sequence[Codec], head_dim: int) -> None:
        matrices: list[np.ndarray | None] = []
        self._examples: list[Codec] = []  # one codec of each rotation
        of_codec = []
        for codec in codecs:
            matrix = codec.rotation(head_dim)
            number = next((i for i, known in enumerate(matrices) if _same(known, matrix)), len(matrices))
            if number == len(matrices):
                matrices.append(matrix)
                self._examples.append(codec)
            of_codec.append(number)
        self.of_codec = tuple(of_codec)

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
