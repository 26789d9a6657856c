"""A side's process, seen from the one that asks."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.sides import Side
from fineserve_jax.loaders.fetch import cache_directory

ROOT = Path(__file__).parents[2]  # where `benchmarks` is found
REST_S = 0.5  # before an engine is asked, so that the threads of the one before it stop spinning


class Process:
    """Starts a side's engine; what it prints goes to a file.

    Attributes:
        peak_memory_bytes, versions: as it last told.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.begun = time.perf_counter()
        self.peak_memory_bytes, self.versions = 0, dict[str, str]()
        folder = cache_directory() / "peers" / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{side.name.replace('/', '-').replace(' ', '-')}.log"
        own, theirs = os.pipe()
        command = [
            str(side.python),
            "-m",
            "benchmarks.peers.worker",
            side.engine,
            json.dumps(side.options),
            str(theirs),
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=[theirs],
                cwd=ROOT,
                env=os.environ | side.variables,
            )
        os.close(theirs)
        self._answers = os.fdopen(own)

    def ask(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[float]]:
        """The seconds at which each prompt's tokens came; see `benchmarks.peers.engines`.

        Raises:
            RuntimeError: the process ended, or gave another number of tokens than it was asked for.
        """
        time.sleep(REST_S)
        try:
            print(json.dumps({"prompts": prompts, "lengths": lengths}), file=self._process.stdin, flush=True)
            answer = json.loads(self._answers.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()  # so that all that it had to say is in the file
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{self.side.name} ended; the last lines of {self.log}:\n{last}")
        if [len(times) for times in answer["times"]] != list(lengths):
            raise RuntimeError(f"{self.side.name} gave {[len(t) for t in answer['times']]} tokens, not {list(lengths)}")
        self.peak_memory_bytes, self.versions = answer["peak_memory_bytes"], answer["versions"]
        return answer["times"]

    def close(self) -> None:
        """Ends the process, however long it takes to end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
