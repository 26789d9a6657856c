"""Which implementation of the operations runs: XLA anywhere, C++ on CPUs, Triton on NVIDIA GPUs, Mosaic on TPUs."""

import os
from typing import Literal, get_args

import jax

from fineserve_jax.pallas_kernels.cpu import library

Implementation = Literal["xla", "cpu", "triton", "mosaic_tpu"]

VARIABLE = "FINESERVE_ATTENTION"
BY_PLATFORM: dict[str, Implementation] = {"cpu": "cpu", "gpu": "triton", "tpu": "mosaic_tpu"}


def default_implementation() -> Implementation:
    """What the environment variable FINESERVE_ATTENTION says, else what suits JAX's default platform.

    On CPUs that is XLA where the compiled kernels are not there.

    Raises:
        ValueError: the variable names no implementation, or one that cannot run here.
    """
    if wanted := os.environ.get(VARIABLE):
        return check_implementation(wanted, VARIABLE)
    return "xla" if missing_kernels() else BY_PLATFORM.get(jax.default_backend(), "xla")


def check_implementation(name: str, source: str = "implementation") -> Implementation:
    """`name` if it is an implementation that can run here. Raises ValueError, naming `source`, if it is not."""
    for known in get_args(Implementation):
        if name == known:
            if known == "cpu":
                _check_cpu(source)
            return known
    raise ValueError(f"{source}={name!r} is no implementation; use one of {', '.join(get_args(Implementation))}")


def missing_kernels() -> str | None:
    """Why JAX's default platform lacks its compiled kernels, and what to do about it; None: it lacks none."""
    return library.why_unavailable() if BY_PLATFORM.get(jax.default_backend()) == "cpu" else None


def is_interpreted(implementation: Implementation) -> bool:
    """Whether kernels of this implementation have to be interpreted on JAX's default platform."""
    return implementation not in ("xla", "cpu", BY_PLATFORM.get(jax.default_backend()))


def _check_cpu(source: str) -> None:
    if jax.default_backend() != "cpu":
        raise ValueError(f"{source}='cpu' runs on CPUs, and JAX's platform is {jax.default_backend()}; leave it out")
    if reason := library.why_unavailable():
        raise ValueError(f"{source}='cpu' cannot be used: {reason}, or use 'xla'")
