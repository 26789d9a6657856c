"""stdin, stdout and stderr, which may be closed, full, or of an encoding that lacks most characters."""

import io
import os
import sys

from fineserve_jax.errors import ConfigError, RequestError


def mend_streams() -> None:
    """Text that stdout's encoding lacks is written as its code points, and a closed stderr takes what it gets.

    Without the latter, what is printed to stderr would be printed to stdout.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open as long as the process


def drop_stdout() -> None:
    """What is still buffered has nowhere to go; without this the interpreter would complain about it as it exits."""
    if sys.stdout is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_stdin() -> str:
    """All of stdin: UTF-8, whatever the terminal's encoding is.

    Raises:
        ConfigError: stdin is closed.
        RequestError: it is not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed; give the text as an argument, or pipe it in")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"stdin is not UTF-8: {error.reason} at byte {error.start}; convert it, e.g. by iconv -f LATIN1 -t UTF-8"
        ) from None
