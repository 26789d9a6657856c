"""Paged attention over KV caches of mixed precisions, and writing them. README.md shows how to call it.

Names are imported when they are first asked for: `format_sizes` and `geometry` are usable without jax.
"""

if __name__ == "pallas_kernels":  # imported from the repository's root: a second copy, with registries of its own
    raise ImportError(
        "import fineserve_jax.pallas_kernels instead of pallas_kernels; the folder is a package of fineserve_jax"
    )

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fineserve_jax.pallas_kernels.arena import new_arena
    from fineserve_jax.pallas_kernels.formats import FORMATS, KVFormat, get_format, register
    from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
    from fineserve_jax.pallas_kernels.operations import (
        paged_attention,
        plan_attention,
        requantize,
        write_pages,
        write_tokens,
    )
    from fineserve_jax.pallas_kernels.softmax import PartialAttention
    from fineserve_jax.pallas_kernels.specs import AttentionSpec, WriteSpec
    from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles

__all__ = [
    "FORMATS",
    "AttentionSpec",
    "BatchSegment",
    "KVFormat",
    "PageGeometry",
    "PartialAttention",
    "QueryRun",
    "Tiles",
    "WriteSpec",
    "choose_unit_words",
    "get_format",
    "new_arena",
    "paged_attention",
    "plan_attention",
    "register",
    "requantize",
    "write_pages",
    "write_tokens",
]

_MODULES = {
    "arena": ("new_arena",),
    "formats": ("FORMATS", "KVFormat", "get_format", "register"),
    "geometry": ("PageGeometry", "choose_unit_words"),
    "operations": ("paged_attention", "plan_attention", "requantize", "write_pages", "write_tokens"),
    "softmax": ("PartialAttention",),
    "specs": ("AttentionSpec", "WriteSpec"),
    "tiles": ("BatchSegment", "QueryRun", "Tiles"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
