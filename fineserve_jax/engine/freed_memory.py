"""Memory that was freed, given back to the system."""

import ctypes
import functools
import sys


@functools.cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def give_back_freed_memory() -> None:
    """What malloc keeps of freed memory goes back to the system now, if malloc is glibc's; see malloc_trim(3).

    Each thread has a store of its own, so that models which come and go would take ever more.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
