"""How the engine's programs are compiled: jitted, counted, and with the options that keep their sums right.

jaxlib 0.10.2 hands products of matrices on CPUs to YNNPACK, joined with what follows them; where that is a reduction of
many rows, the sum can come out wrong (jax-ml/jax#39103). Programs of a step have such pairs: log-probabilities behind
the output head, rotations behind sums. Handed over one by one, products are right and as fast as before.
"""

import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax

FUSION_FLAG = "xla_cpu_experimental_ynn_fusion_type"
SINGLE_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
RIGHT_SINCE = (0, 11)
"""Version of jaxlib from which on joined products are right."""


def compiler_options() -> dict[str, str] | None:
    """XLA's options for programs on the default device; None for its own. A flag that the user has set stands."""
    is_right = tuple(int(part) for part in version("jaxlib").split(".")[:2]) >= RIGHT_SINCE
    if is_right or jax.default_backend() != "cpu" or FUSION_FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    return {FUSION_FLAG: SINGLE_PRODUCTS}


def compile_counted(
    function: Callable[..., Any],
    on_compile: Callable[[], None],
    donate_argnums: Sequence[int] = (),
    static_argnums: Sequence[int] = (),
) -> Callable[..., Any]:
    """`function` as a jitted program.

    Args:
        on_compile: called for each program that is compiled or loaded from the compilation cache.
        donate_argnums: arguments whose memory the result may take.
        static_argnums: arguments that a program is compiled for.
    """

    def traced(*arguments: Any) -> Any:
        on_compile()  # runs while jax traces, so once for each program
        return function(*arguments)

    options = compiler_options()
    return jax.jit(traced, donate_argnums=donate_argnums, static_argnums=static_argnums, compiler_options=options)
