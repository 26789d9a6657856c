"""KV formats and their registry.

To add one: subclass `KVFormat` and `register` an instance. Pools, scheduler, kernels and command line take it from
here. A package can offer one as an entry point of `fineserve_jax.kv_formats`: the format's name, and where its class or
an instance is.
"""

from importlib.metadata import entry_points

from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES, Granularity
from fineserve_jax.pallas_kernels.formats.base import KVFormat, PackedLanes, PageVectors, PageWords
from fineserve_jax.pallas_kernels.formats.fp8 import Float8KV
from fineserve_jax.pallas_kernels.formats.int4 import Int4KV
from fineserve_jax.pallas_kernels.formats.int8 import Int8KV
from fineserve_jax.pallas_kernels.formats.wide import BFloat16KV, Float16KV, Float32KV

__all__ = ["FORMATS", "Granularity", "KVFormat", "PackedLanes", "PageVectors", "PageWords", "get_format", "register"]

FORMATS: dict[str, KVFormat] = {}
ENTRY_POINTS = "fineserve_jax.kv_formats"


def register(kv_format: KVFormat) -> KVFormat:
    """Makes a format known under its name, to everyone who computes with it and to those who count its pages.

    Raises:
        ValueError: the name is taken, its residual format is unusable, or none is named though some scales are not per
            token.
    """
    name, residual = kv_format.name, kv_format.residual
    if name in FORMATS:
        raise ValueError(f"a KV format named {name!r} is registered already; choose another name")
    if residual is None:
        if any(part is not Granularity.TOKEN for part in kv_format.scales):
            parts = ", ".join(part.value for part in kv_format.scales)
            raise ValueError(
                f"KV format {name!r} has scales ({parts}) that take a whole page to encode; "
                "name the format of its newest tokens as `residual`"
            )
    elif residual not in FORMATS or FORMATS[residual].residual is not None:
        raise ValueError(
            f"KV format {name!r} wants {residual!r} for its newest tokens, "
            "which is no registered token-wise format; register that first"
        )
    FORMATS[name] = FORMAT_SIZES[name] = kv_format
    return kv_format


def get_format(name: str) -> KVFormat:
    """The format called `name`, registered or offered by an installed package. Raises ValueError, naming those there
    are."""
    if name not in FORMATS:
        _register_offered(name)
    return FORMATS[name]


def _register_offered(name: str) -> None:
    offered = entry_points(group=ENTRY_POINTS)
    if name not in offered.names:
        known = ", ".join([*FORMATS, *sorted(offered.names)])
        raise ValueError(f"unknown KV precision {name!r}; choose one of {known}")
    found = offered[name].load()
    kv_format = found() if isinstance(found, type) else found
    if not isinstance(kv_format, KVFormat) or kv_format.name != name:
        raise ValueError(f"entry point {name!r} of {ENTRY_POINTS} is {found!r}, which is no KVFormat of that name")
    if FORMATS.get(name) is not kv_format:  # its module may have registered it
        register(kv_format)


for _format in (Float32KV(), BFloat16KV(), Float16KV(), Int8KV(), Float8KV(), Int4KV()):
    register(_format)
