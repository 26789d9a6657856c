"""One writer an output: a file beside it that is locked as long as its process lives."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from fineserve_jax.errors import ConfigError

SUFFIX = ".lock"


class OutputLock:
    """Held from construction to `close`. The system releases it when the process ends, however that happens.

    Args:
        output: the file that is to be written.

    Raises:
        ConfigError: a process that lives holds it, or the file system knows no locks.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._file = -1
        while self._file < 0:
            self._file = self._locked(output)
        os.truncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)

    def _locked(self, output: Path) -> int:
        """The file, locked; -1 if its last holder has removed it meanwhile."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"the output {output} cannot be written: {error.strerror}; name another") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file), os.stat(self.path)):
                return file
        except BlockingIOError:
            pid, _, host = os.pread(file, 1000, 0).decode(errors="replace").strip().partition(" ")
            os.close(file)
            raise ConfigError(
                f"process {pid or 'unknown'} on {host or 'this machine'} is writing {output}; wait until it has ended, "
                "end it, or name another output"
            ) from None
        except OSError as error:
            os.close(file)
            raise ConfigError(
                f"{self.path} cannot be locked: {error.strerror}; put the output on a file system that knows locks"
            ) from None
        os.close(file)
        return -1

    def close(self) -> None:
        """Lets others write the output."""
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            os.close(self._file)
            self._file = -1
