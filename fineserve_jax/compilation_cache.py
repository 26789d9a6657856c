"""JAX's persistent compilation cache: programs compiled once are loaded at the next start."""

import os
from pathlib import Path

import jax

from fineserve_jax.loaders.fetch import cache_directory

MIN_COMPILE_S = 0.3


def use_compilation_cache() -> Path | None:
    """Turns the cache on, in the project's cache directory, unless JAX was given one or told to have none.

    Returns:
        where programs are kept; None if the user has switched the cache off (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    if not jax.config.read("jax_enable_compilation_cache"):
        return None
    if jax.config.read("jax_compilation_cache_dir") is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
    return Path(jax.config.read("jax_compilation_cache_dir"))
