"""JAX's persistent compilation cache: programs compiled once are loaded at the next start."""

from pathlib import Path
from typing import Any

import jax

from fineserve_jax.loaders.fetch import cache_directory

MIN_COMPILE_S = 0.3


def use_compilation_cache() -> Path | None:
    """Turns the cache on, in the project's cache directory, unless JAX was given one or told to have none.

    Returns:
        where programs are kept; None if the user has switched the cache off (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    settings: Any = jax.config  # its flags are not declared to type checkers
    if not settings.jax_enable_compilation_cache:
        return None
    if settings.jax_compilation_cache_dir is None:
        settings.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        settings.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
    return Path(settings.jax_compilation_cache_dir)
