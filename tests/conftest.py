"""What holds for all tests."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes of these modules' arrays are checked against their annotations at every call, in tests only: for
# users they are mere comments. Runs before anything imports the modules.
SHAPES_CHECKED = [
    "fineserve_jax.models.experts",
    "fineserve_jax.models.layers",
    "fineserve_jax.models.rope",
    "fineserve_jax.models.transformer",
    "fineserve_jax.models.weight_formats",
    "fineserve_jax.pallas_kernels.operations",
    "fineserve_jax.runner.sampler",
    "fineserve_jax.runner.scoring",
]
install_import_hook(SHAPES_CHECKED, "beartype.beartype")

# A machine that is busy with something else fails no test.
settings.register_profile("timeless", settings(), deadline=None)
settings.load_profile("timeless")

pytest_plugins = ["compiling"]


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
"""Of a process's memory. Each program takes dozens; Linux allows 65,530, and XLA crashes where there are none left."""


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped_before_there_are_too_many() -> Iterator[None]:
    yield
    if "jax" in sys.modules and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()
