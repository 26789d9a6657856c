"""How the Triton backend cuts batches."""

from fineserve_jax.pallas_kernels.tiling import TileSizes, Tiling

# A tile is a program's work; splits of 512 tokens give a long row to many cores at once.
TILING = Tiling(
    decode=TileSizes(splits=1, queries=1, tokens=512),
    ragged=TileSizes(splits=1, queries=32, tokens=4096),
)
