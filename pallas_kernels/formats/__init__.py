"""KV formats and their registry.

To add one: subclass `TokenFormat` (each token encoded by itself) or `KVFormat` (whole pages), and `register` an
instance. Pools, scheduler, kernels and command line take it from here.
"""

from fineserve_jax.pallas_kernels.formats.base import KVFormat, PageVectors, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.formats.int4 import Int4
from fineserve_jax.pallas_kernels.formats.int8 import Int8
from fineserve_jax.pallas_kernels.formats.wide import BFloat16, Float16, Float32

__all__ = ["FORMATS", "KVFormat", "PageVectors", "PageWords", "TokenFormat", "get_format", "register"]

FORMATS: dict[str, KVFormat] = {}


def register(kv_format: KVFormat) -> KVFormat:
    """Makes a format known under its name. Raises ValueError if the name is taken or its tail is unusable."""
    if kv_format.name in FORMATS:
        raise ValueError(f"a KV format named {kv_format.name!r} is registered already; choose another name")
    if kv_format.tail is not None and not isinstance(FORMATS.get(kv_format.tail), TokenFormat):
        raise ValueError(
            f"KV format {kv_format.name!r} wants {kv_format.tail!r} for its newest tokens, "
            "which is no registered token-wise format; register that first"
        )
    FORMATS[kv_format.name] = kv_format
    return kv_format


def get_format(name: str) -> KVFormat:
    """The format called `name`. Raises ValueError, naming those there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown KV precision {name!r}; choose one of {', '.join(FORMATS)}") from None


for _format in (Float32(), BFloat16(), Float16(), Int8(), Int4()):
    register(_format)
