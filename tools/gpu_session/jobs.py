"""Jobs in processes of their own, within a time for all of them."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LEAST_S = 5.0  # a job is not begun with less time left
TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class Job:
    """A command whose last line of output is JSON.

    Attributes:
        most_s: seconds after which it is ended.
    """

    name: str
    command: Sequence[str]
    most_s: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        status: "ok"; "failed", with an exit status other than 0 or without a result; "too long"; "no time left".
        result: what its last line says, even if it failed.
        tail: its last lines of output, unless it is ok.
    """

    status: str
    seconds: float
    result: Any = None
    tail: str = ""


def run_jobs(
    jobs: Sequence[Job],
    seconds: float,
    variables: Mapping[str, str],
    note: Callable[[Mapping[str, Outcome]], None],
) -> dict[str, Outcome]:
    """Runs jobs until the time for all of them is over.

    Args:
        variables: of their environment, besides this process's.
        note: called with what there is behind each job.
    """
    end, outcomes = time.monotonic() + seconds, dict[str, Outcome]()
    for job in jobs:
        left = end - time.monotonic()
        outcomes[job.name] = _run(job, min(left, job.most_s), variables) if left >= LEAST_S else NONE_LEFT
        note(outcomes)
    return outcomes


NONE_LEFT = Outcome("no time left", 0.0)


def _run(job: Job, most_s: float, variables: Mapping[str, str]) -> Outcome:
    begun = time.monotonic()
    # A session of its own, so that whatever it starts ends with it.
    process = subprocess.Popen(
        job.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | variables,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=most_s)
        is_late = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        is_late = True
    lines = printed.splitlines()
    result = _json(lines[-1]) if lines else None
    status = "too long" if is_late else "ok" if process.returncode == 0 and result is not None else "failed"
    return Outcome(status, time.monotonic() - begun, result, "" if status == "ok" else "\n".join(lines[-TAIL_LINES:]))


ROOT = Path(__file__).parents[2]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
