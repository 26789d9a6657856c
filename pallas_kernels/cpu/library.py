"""The library of compiled kernels: whether it is there, and which instruction set's kernels it runs.

It is built when the package is installed where a C++ compiler is (`setup.py`), and registered with XLA when it is first
asked for. Each kernel is there for several instruction sets; the best that this processor has is used, unless the
environment variable FINESERVE_CPU_ISA names another.
"""

import ctypes
import functools
import importlib.util
import logging
import os

log = logging.getLogger(__name__)

VARIABLE = "FINESERVE_CPU_ISA"
INTERFACE = 3
"""Of the custom calls, as `library.cpp` counts it."""
TARGETS = (
    "fineserve_attend",
    "fineserve_attend_within",
    "fineserve_multiply_bf16",
    "fineserve_multiply_int8",
    "fineserve_multiply_int4",
)


def why_unavailable() -> str | None:
    """What keeps the compiled kernels from being used, and what to do about it; None: nothing does.

    Raises:
        ValueError: FINESERVE_CPU_ISA names no instruction set that this processor has kernels for.
    """
    return _load()[1]


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor has kernels for, the best first."""
    return _supported(_library())


def instruction_set() -> str:
    """The one whose kernels are used."""
    name: bytes = _library().fineserve_instruction_set()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Uses the kernels of another instruction set from now on, in programs that are compiled already, too.

    Raises:
        ValueError: this processor has no kernels of that name.
    """
    _use(_library(), name, "instruction set")


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, its custom calls registered, or the reason why there is none."""
    spec = importlib.util.find_spec("fineserve_jax.pallas_kernels.cpu._kernels")
    if spec is None or spec.origin is None:
        return None, (
            "the compiled kernels for CPUs were not built; install a C++ compiler (GCC 12 or Clang 15, or newer) and "
            "then the package again"
        )
    try:
        library = ctypes.CDLL(spec.origin)
        interface = library.fineserve_interface()
    except (OSError, AttributeError) as error:
        return None, _unusable(spec.origin, str(error))
    if interface != INTERFACE:
        return None, _unusable(spec.origin, f"it has interface {interface}, and {INTERFACE} is needed")
    library.fineserve_supported.restype = library.fineserve_instruction_set.restype = ctypes.c_char_p
    if wanted := os.environ.get(VARIABLE):
        _use(library, wanted, VARIABLE)
    _register(library)
    return library, None


def _unusable(path: str, reason: str) -> str:
    message = f"the compiled kernels for CPUs in {path} cannot be used ({reason}); install the package again"
    log.warning("%s; XLA does their work meanwhile", message)
    return message


def _supported(library: ctypes.CDLL) -> tuple[str, ...]:
    names: list[str] = []
    while (name := library.fineserve_supported(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _use(library: ctypes.CDLL, name: str, source: str) -> None:
    if not library.fineserve_use(name.encode()):
        known = ", ".join(_supported(library))
        raise ValueError(f"{source}={name!r} is none that this processor has kernels for; use one of {known}")


def _register(library: ctypes.CDLL) -> None:
    import jax  # costs a second, and who only asks for sizes needs none

    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
