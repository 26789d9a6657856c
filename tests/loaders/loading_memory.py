"""Loads a model in a process of its own and prints how many bytes it needed at most, and how many it holds.

    python loading_memory.py PATH WEIGHTS

Most memory is the operating system's account of it (VmHWM), from when the package and JAX are up until all is loaded.
"""

import re
import sys
from pathlib import Path

import jax

from fineserve_jax.loaders import load_model


def resident(key: str) -> int:
    """Bytes of memory by the name that Linux has for them in /proc/self/status: VmHWM is the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) << 10


def main(path: str, weights: str, warm_up: str) -> None:
    load_model(warm_up, weights)  # compiles and imports all that loading needs
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    model = load_model(path, weights)
    held = sum(array.nbytes for array in jax.tree.leaves(model.params))
    print(resident("VmHWM") - before, held)


if __name__ == "__main__":
    main(*sys.argv[1:])
