"""Which implementation multiplies: XLA's products, or on CPUs compiled ones that read each weight once.

The compiled ones win where rows are few, since XLA's read weights at a fraction of the memory's rate there, and where
arithmetic is the limit as far as it was measured. A program has one number of rows, so the choice is made when it is
traced.
"""

import os

import jax

from fineserve_jax.errors import ConfigError
from fineserve_jax.pallas_kernels.cpu import library

VARIABLE = "FINESERVE_PRODUCTS"
MOST_ROWS = {"bf16": 1024, "int8": 4096, "int4": 1024}
"""Up to how many rows the compiled products are taken, by kind of weights: as far as they were no slower where measured
(docs/performance.md)."""


def uses_compiled(kind: str, rows: int) -> bool:
    """Whether the product of `rows` vectors with weights of a kind of `MOST_ROWS` is a compiled one."""
    return rows <= MOST_ROWS[kind] and compiled_products()


def compiled_products() -> bool:
    """Whether there are compiled products here, and FINESERVE_PRODUCTS does not say `xla`.

    Raises:
        ConfigError: the variable says `cpu` where they are not there, or neither of both.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted not in (None, "", "xla", "cpu"):
        raise ConfigError(f"{VARIABLE}={wanted!r} is no implementation of products; use one of xla, cpu")
    if wanted == "xla":
        return False
    on_cpu = jax.default_backend() == "cpu"
    try:
        reason = library.why_unavailable() if on_cpu else f"JAX's platform is {jax.default_backend()}"
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if reason and wanted == "cpu":
        raise ConfigError(f"{VARIABLE}='cpu' cannot be used: {reason}, or use 'xla'")
    return not reason
