"""Which implementation of the operations runs: XLA anywhere, Triton on NVIDIA GPUs, Mosaic on TPUs."""

import os
from typing import Literal, get_args

import jax

Implementation = Literal["xla", "triton", "mosaic_tpu"]

VARIABLE = "FINESERVE_ATTENTION"
BY_PLATFORM: dict[str, Implementation] = {"cpu": "xla", "gpu": "triton", "tpu": "mosaic_tpu"}


def default_implementation() -> Implementation:
    """What the environment variable FINESERVE_ATTENTION says, else what suits JAX's default platform.

    Raises:
        ValueError: the variable names no implementation.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return BY_PLATFORM.get(jax.default_backend(), "xla")
    return check_implementation(wanted, VARIABLE)


def check_implementation(name: str, source: str = "implementation") -> Implementation:
    """`name` if it is an implementation. Raises ValueError, naming `source`, if it is not."""
    for known in get_args(Implementation):
        if name == known:
            return known
    raise ValueError(f"{source}={name!r} is no implementation; use one of {', '.join(get_args(Implementation))}")


def is_interpreted(implementation: Implementation) -> bool:
    """Whether kernels of this implementation have to be interpreted on JAX's default platform."""
    return implementation not in ("xla", BY_PLATFORM.get(jax.default_backend()))
