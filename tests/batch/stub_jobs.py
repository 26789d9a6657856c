"""Jobs on the stub engine in processes of their own, to be killed at any moment.

A server that has imported everything forks each of them, which takes milliseconds.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine

from fineserve_jax.entrypoints.batch import journal, run_batch
from fineserve_jax.errors import FineServeError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "stub_jobs"])
TOKENS = 12


def start(*arguments: Any, **options: Any) -> Any:
    """A process that runs `answer` of these arguments."""
    return start_process(answer, *arguments, **options)


def start_process(function: Callable[..., None], *arguments: Any, **options: Any) -> Any:
    """A process that runs a function, which its module has to offer by name."""
    with pytest.MonkeyPatch.context() as patch:  # until Python 3.13 the server does not look where this process does
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    process = PROCESSES.Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def answer(
    source: Path,
    target: Path,
    *,
    log: Path | None = None,
    step_s: float = 0.004,
    batch: int = 8,
    commit_every_s: float = 0.01,
    max_file_bytes: int | None = None,
    **options: Any,
) -> None:
    """Answers a file as the command does, and exits with its status.

    Args:
        log: to which a byte is added for each token that is sampled.
        commit_every_s: from one commit of the journal to the next, whatever it costs.
        max_file_bytes: to how many bytes files can grow, as if the disk were full then.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, and hangups
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    journal.MIN_INTERVAL_S = journal.MAX_INTERVAL_S = commit_every_s
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open as long as the process
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    tokens = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def make() -> StubEngine:
        return StubEngine(batch, step_s, fails=None if tokens is None else lambda rows: note(tokens, rows))

    try:
        summary = run_batch("stub", source, target, make_engine=make, **options)
    except FineServeError as error:
        with contextlib.suppress(OSError):
            Path(f"{target}.error").write_text(str(error))
        os._exit(2)
    os._exit(3 if summary.interrupted else 0)


def note(log: int, rows: Sequence[Any]) -> None:
    """Takes down that a token is sampled for each of the rows: whose it is, and which."""
    os.write(log, "".join(f"{row.token_ids[:2]} {row.num_output_tokens}\n" for row in rows).encode())


def write_rows(path: Path, count: int, **fields: Any) -> None:
    """Rows of `TOKENS` tokens each and as many as 20, which are sampled; some have samples, log-probabilities, or an
    error."""
    with path.open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {"id": f"row {number}", "prompt": [5 + number // 80, 5 + number % 80, 7]}
            row |= {"max_tokens": TOKENS + number % 9, "temperature": 1.0, **fields}
            if number % 10 == 3:
                row["logprobs"] = 0
            if number % 10 == 7:
                row["n"] = 2
            if number % 50 == 49:
                row["prompt"] = 5
            file.write(json.dumps(row) + "\n")
