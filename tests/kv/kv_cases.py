"""Page classes and small arenas that the tests of the KV bookkeeping share."""

import pickle

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.slabs import SlabAllocator

PAGE_SIZE = 4
UNIT_BYTES = 8


def page_class(kv_format: str, units: int, *, model: str = "m", residual: PageClass | None = None) -> PageClass:
    """A class whose pages leave 3 bytes of their units unused."""
    return PageClass(model, kv_format, units, PAGE_SIZE, units * UNIT_BYTES - 3, residual)


# Lengths that do not divide each other; int4 keeps its newest page in bf16.
BF16 = page_class("bf16", 7)
INT8 = page_class("int8", 5)
INT4 = page_class("int4", 3, residual=BF16)
FP32 = page_class("fp32", 13)
OTHER_INT8 = page_class("int8", 2, model="other")

# The real lengths, in units of 256 bytes, of SmolLM2-135M's pages of 16 tokens: fp32, bf16, int8, int4.
SMOLLM2_UNITS = (2880, 1440, 750, 420)


def arena(num_slabs: int, slab_units: int = 20, policy: str = "elastic", **options) -> SlabAllocator:
    """An arena of that many slabs to hand out, beside the null page's, for BF16, INT8 and INT4."""
    classes = options.pop("classes", (BF16, INT8, INT4))
    return SlabAllocator((num_slabs + 1) * slab_units, slab_units, policy, classes, unit_bytes=UNIT_BYTES, **options)


def pages_of(kv, request) -> list[int]:
    """First units of the request's pages, in order, the residual page aside."""
    return kv.first_units(request, 0, kv.holds(request).num_pages)


def snapshot(state: object) -> bytes:
    """Everything that an allocator or a manager remembers, for comparison."""
    return pickle.dumps(state)
