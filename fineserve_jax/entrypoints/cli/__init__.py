"""The command line, `fineserve-jax COMMAND`: see the table in `commands`."""

import errno
import sys
from collections.abc import Sequence

from fineserve_jax.entrypoints.cli.streams import drop_stdout, mend_streams
from fineserve_jax.errors import FineServeError

# As shells report a program that was interrupted, and one whose reader went away.
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is returned.

    Args:
        arguments: those after the program's name; the process's own if None.

    Returns:
        0 if the command did what it is for (rows of a batch that could not be answered are reported in its
        output), 2 for a mistake of the user's, of which one line `error: ...` tells on stderr, 130 after
        Ctrl-C, 141 if whoever read stdout stopped.

    Raises:
        SystemExit: for `--help`, and for flags that cannot be parsed (status 2).
    """
    mend_streams()
    try:
        from fineserve_jax.entrypoints.cli.commands import (
            run_command,  # here, so that Ctrl-C is quiet while this is imported, too
        )

        run_command(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except FineServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # of a write; an error of opening a file names it
        if error.errno not in CANNOT_WRITE or error.filename is not None:
            raise
        drop_stdout()
        print(
            f"error: the output cannot be written: {error.strerror}; make room, or send it elsewhere", file=sys.stderr
        )
        return EXIT_USAGE
    return 0
