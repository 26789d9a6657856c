"""A program to compile, and the shapes of real models."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from benchmarks.aot.results import Bytes, Result
from benchmarks.aot.targets import Platform
from fineserve_jax.pallas_kernels import KVFormat, PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.formats import Codec, PackedLanes
from fineserve_jax.pallas_kernels.implementation import Implementation

IMPLEMENTATION: dict[Platform, Implementation] = {"gpu": "triton", "tpu": "mosaic_tpu"}
ARENA_WORDS = 1 << 32  # 8 GiB: more than 32 bits can address in bytes


@dataclass(frozen=True)
class Model:
    """The attention of a model.

    Attributes:
        page_sizes: tokens of a page, by platform. A TPU copies whole tiles of 1,024 words, of which pages of few
            tokens would leave some part empty.
    """

    name: str
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    page_sizes: tuple[tuple[Platform, int], ...] = (("gpu", 16), ("tpu", 64))
    window: int | None = None
    soft_cap: float | None = None

    def geometry(self, platform: Platform) -> PageGeometry:
        page_size = dict(self.page_sizes)[platform]
        unit_words = choose_unit_words(self.head_dim, page_size, tpu=platform == "tpu")
        return PageGeometry(self.num_layers, self.kv_heads, self.head_dim, page_size, unit_words)


LLAMA_8B = Model("Llama-3.1-8B", 32, 32, 8, 128)
QWEN_32B = Model("Qwen3-32B", 64, 64, 8, 128)
SMOLLM = Model("SmolLM2-135M", 30, 9, 3, 64, (("gpu", 16), ("tpu", 128)))
# The other head sizes, page sizes and what changes logits, in all formats at once.
PHI = Model("Phi-3-mini", 32, 32, 32, 96, (("gpu", 32), ("tpu", 32)))
GEMMA = Model("Gemma-2-9B", 42, 16, 8, 256, (("gpu", 64), ("tpu", 16)), window=4096, soft_cap=50.0)
MODELS, ODD_MODELS = (LLAMA_8B, QWEN_32B, SMOLLM), (PHI, GEMMA)


class Batch(Protocol):
    """A small batch on which the traffic of a case is counted."""

    def count(self) -> Bytes: ...


@dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
        operation, model, formats: what the table calls it.
        function, arguments: what is compiled, for which shapes (pytrees of `jax.ShapeDtypeStruct`).
        arena_size: words of the arena among the arguments.
        head_dim: of the model.
        donate: arguments whose memory the results may take.
        reads_pages: whether its kernels load keys and values from the arena.
        without_scales: the same program for formats whose scales and zero points are constants, so that all that it
            loads of the arena are keys and values; None where the formats have none.
        batch: for which traffic is counted; None: not.
        strict_bytes: whether the bytes moved must be those of the pages and tables.
    """

    operation: str
    model: str
    formats: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    arena_size: int
    head_dim: int
    donate: tuple[int, ...] = ()
    reads_pages: bool = False
    without_scales: "Case | None" = None
    batch: Batch | None = None
    strict_bytes: bool = True

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.model}, {self.formats}"

    def jitted(self, sharding: jax.sharding.Sharding) -> Any:
        """The function as it is compiled for a device."""
        return jax.jit(self.function, in_shardings=sharding, out_shardings=sharding, donate_argnums=self.donate)

    def result(self, target: str, **found: Any) -> Result:
        """What was found of it for a chip."""
        return Result(target, self.operation, self.model, self.formats, self.head_dim, **found)


def models_of_single_formats(full: bool) -> tuple[Model, ...]:
    """The models at whose shapes formats are compiled by themselves; at all others, all in one program.

    Unless it has to be `full`, one of two models with the same pages is enough.
    """
    return MODELS if full else (LLAMA_8B, SMOLLM)


def shapes_of(tree: Any) -> Any:
    """A pytree of arrays as shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def arena_shape(geometry: PageGeometry) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((ARENA_WORDS // geometry.unit_words, *geometry.unit_shape), jnp.uint16)


def without_scales(kv_format: KVFormat) -> KVFormat:
    """A format like this one, whose scales and zero points all read as 1: compilers then drop the loads of them."""
    return KVFormat(_without_scales(kv_format.key), _without_scales(kv_format.value), kv_format.name)


def _without_scales(codec: Codec) -> Codec:
    class WithoutScales(type(codec)):
        def read_scales(self, scales: PackedLanes) -> PackedLanes:
            return tuple(jnp.ones_like(array) for array in codec.read_scales(scales))

    other = copy.copy(codec)
    other.__class__ = WithoutScales
    return other
