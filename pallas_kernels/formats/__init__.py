"""KV formats and their registry.

A format is a codec of keys and one of values. To add one: subclass `Codec` and `register` a `KVFormat` made of it.
Pools, scheduler, kernels and command line take it from here, and its codecs pair with all others: with int8 for keys
and int4 for values the name is `k8v4`. A package can offer a format as an entry point of `fineserve_jax.kv_formats`:
its name, and where the format is, or what makes it.
"""

import functools
from importlib.metadata import entry_points

from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES, Granularity, formats_of_pair
from fineserve_jax.pallas_kernels.formats.base import (
    KEYS,
    SIDES,
    VALUES,
    Codec,
    EncodedVectors,
    KVFormat,
    PackedLanes,
    PageVectors,
    PageWords,
    UnpackedVectors,
)
from fineserve_jax.pallas_kernels.formats.fp8 import Float8Codec
from fineserve_jax.pallas_kernels.formats.int3 import Int3KeyCodec, Int3ValueCodec
from fineserve_jax.pallas_kernels.formats.int4 import Int4KeyCodec, Int4ValueCodec
from fineserve_jax.pallas_kernels.formats.int8 import Int8Codec
from fineserve_jax.pallas_kernels.formats.wide import BFloat16Codec, Float16Codec, Float32Codec

__all__ = [
    "FORMATS",
    "KEYS",
    "SIDES",
    "VALUES",
    "Codec",
    "EncodedVectors",
    "Granularity",
    "KVFormat",
    "PackedLanes",
    "PageVectors",
    "PageWords",
    "UnpackedVectors",
    "get_format",
    "register",
]

FORMATS: dict[str, KVFormat] = {}
"""Every registered format, by name: what is served unless somebody says otherwise."""
NAMED_FORMATS: dict[str, KVFormat] = {"int3": KVFormat(Int3KeyCodec(), Int3ValueCodec())}
"""Formats that are served only where they are named, as pairs are: a kernel has a branch for each that is served."""
ENTRY_POINTS = "fineserve_jax.kv_formats"


def register(kv_format: KVFormat) -> KVFormat:
    """Makes a format known under its name, to everyone who computes with it and to those who count its pages.

    Raises:
        ValueError: the name is taken, its residual format is unusable, or none is named though some scales are not per
            token.
    """
    if kv_format.name in FORMATS or NAMED_FORMATS.get(kv_format.name, kv_format) is not kv_format:
        raise ValueError(f"a KV format named {kv_format.name!r} is registered already; choose another name")
    for codec in kv_format.sides:
        if codec.residual is None and any(part is not Granularity.TOKEN for part in codec.scales):
            parts = ", ".join(part.value for part in codec.scales)
            raise ValueError(
                f"codec {codec.name!r} has scales ({parts}) that take a whole page to encode; "
                "name the codec of its newest tokens as `residual`"
            )
    FORMATS[kv_format.name] = FORMAT_SIZES[kv_format.name] = kv_format
    if (reason := _unusable_residual(kv_format)) is not None:
        del FORMATS[kv_format.name], FORMAT_SIZES[kv_format.name]
        raise ValueError(f"KV format {kv_format.name!r} wants {kv_format.residual!r} for its newest tokens, {reason}")
    return kv_format


def _unusable_residual(kv_format: KVFormat) -> str | None:
    """Why its residual format, perhaps a pair with a codec of its own, cannot hold new tokens; None: it can."""
    try:
        if kv_format.residual is None or get_format(kv_format.residual).residual is None:
            return None
    except ValueError as error:
        return f"which there is not ({error})"
    return "which is not token-wise"


def get_format(name: str) -> KVFormat:
    """The format called `name`: one there is, a pair of their codecs, or what an installed package offers.

    Raises:
        ValueError: there is none; the message names those there are.
    """
    if name in NAMED_FORMATS:
        return NAMED_FORMATS[name]
    if name in FORMATS or _register_offered(name):
        return FORMATS[name]
    if (pair := formats_of_pair(name, (*FORMATS.values(), *NAMED_FORMATS.values()))) is None:
        known = ", ".join([*FORMATS, *NAMED_FORMATS, *sorted(entry_points(group=ENTRY_POINTS).names)])
        raise ValueError(f"unknown KV precision {name!r}; choose one of {known}, or a pair such as k8v4")
    return _pair(pair[0].key, pair[1].value)


@functools.cache
def _pair(key: Codec, value: Codec) -> KVFormat:
    """One object for each pair, since formats are compared by identity."""
    return KVFormat(key, value)


def _register_offered(name: str) -> bool:
    """Registers what an installed package offers under that name; False: none does."""
    offered = entry_points(group=ENTRY_POINTS)
    if name not in offered.names:
        return False
    found = offered[name].load()
    kv_format = found() if callable(found) else found
    if not isinstance(kv_format, KVFormat) or kv_format.name != name:
        raise ValueError(f"entry point {name!r} of {ENTRY_POINTS} is {found!r}, which is no KVFormat of that name")
    if FORMATS.get(name) is not kv_format:  # its module may have registered it
        register(kv_format)
    return True


for _codec in (Float32Codec(), BFloat16Codec(), Float16Codec(), Int8Codec(), Float8Codec()):
    register(KVFormat(_codec, _codec))
register(KVFormat(Int4KeyCodec(), Int4ValueCodec()))
