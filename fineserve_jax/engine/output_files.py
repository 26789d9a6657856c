"""Files to be written at the end of some work: whether they can be is known before it."""

import os
from pathlib import Path

from fineserve_jax.errors import ConfigError


def check_can_write(option: str, path: str | Path | None, *, replaced: bool = False) -> None:
    """Raises ConfigError if a file could not be written; None is no file.

    Args:
        option: by which the user named it.
        replaced: whether it is written beside and then put in its place, for which the folder has to be writable even
            if the file is.
    """
    if path is None:
        return
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise ConfigError(f"{option}={str(path)!r} cannot be written: there is no folder {target.parent}; create it")
    written = target if target.exists() and not replaced else target.parent
    if target.is_dir() or not os.access(written, os.W_OK):
        raise ConfigError(f"{option}={str(path)!r} cannot be written; name a file in a folder that can be written to")
