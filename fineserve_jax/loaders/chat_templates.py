"""Chat templates are rendered by a process of their own, so that a hostile one costs seconds and not the machine."""

import atexit
import json
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from fineserve_jax.errors import RequestError

WORKER = Path(__file__).with_name("template_worker.py")
MAX_SECONDS = 10.0
"""Longest time that rendering one conversation may take."""


class TemplateRenderer:
    """Renders templates in a worker process, which is started when it is first needed and after it was ended.

    May be used by several threads; they take turns.

    Args:
        max_seconds: after so long the worker is ended, and the template refused.
    """

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, values: dict[str, Any]) -> str:
        """The text of a Jinja template.

        Raises:
            RequestError: values that JSON does not have; a template that is broken, refuses the values, fails on them,
                or takes too long or too much memory.
        """
        try:
            asked = json.dumps({"template": template, "values": values})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages and what goes with them must be JSON values: {error}") from None
        with self._lock:
            answer = self._ask(asked)
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise RequestError(f"the model's chat template refuses these messages: {answer['refused']}")
        raise RequestError(f"the model's chat template fails on these messages: {answer['failed']}")

    def close(self) -> None:
        """End the worker, if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()

    def _ask(self, line: str) -> dict[str, str]:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = _start()
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None, "it was started with pipes"
        assert stdout is not None, "it was started with pipes"
        try:
            stdin.write(line + "\n")
            stdin.flush()
            if not _is_ready(stdout, self._max_seconds):
                self.close()
                return {"failed": f"it takes more than {self._max_seconds:g} s"}
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        except BaseException:  # an interrupt: what the worker answers is of no use to the next who asks
            self.close()
            raise
        if not answer.endswith("\n"):  # ended, perhaps in the middle of its answer
            self.close()
            return {"failed": "the process that renders it has ended, most likely for want of memory"}
        return dict(json.loads(answer))


def _start() -> "subprocess.Popen[str]":
    # -P: the folder of the script is no place to import from.
    command = [sys.executable, "-P", str(WORKER)]
    # A session of its own: Ctrl-C is for the process that serves.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii", start_new_session=True
    )


def _is_ready(stream: Any, seconds: float) -> bool:
    """Whether the stream has something to read within that time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


RENDERER = TemplateRenderer()
atexit.register(RENDERER.close)
