"""What an engine does when a call of it was cut short: by an interrupt, by a failed program, by whatever was raised."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fineserve_jax.engine.output_processor import OutputProcessor
from fineserve_jax.engine.pipeline import StepPipeline
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request, RequestStatus
from fineserve_jax.runner.arena import Arena
from fineserve_jax.scheduler import Scheduler

log = logging.getLogger(__name__)


class Recovery:
    """Knows whether the books are in the middle of a change, and makes them anew.

    Args:
        arena, kv, scheduler: of the engine.
        outputs: what knows all requests that are not released.
        pipeline: what has called steps that are not collected.
    """

    def __init__(
        self, arena: Arena, kv: KVManager, scheduler: Scheduler, outputs: OutputProcessor, pipeline: StepPipeline
    ) -> None:
        self._arena, self._kv, self._scheduler, self._outputs = arena, kv, scheduler, outputs
        self._pipeline = pipeline
        self._is_changing = False
        self._served_only: set[Request] | None = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what changes the books: if that raises, the next `recover` has something to do."""
        self._is_changing = True
        yield
        self._is_changing = False

    def serve_only(self, requests: Iterable[Request] | None) -> None:
        """Serves these requests, and those that come from now on, with all others kept waiting; None: all again.

        Those that are served from the next call on are computed again from their tokens.
        """
        wanted = None if requests is None else set(requests)
        if wanted != self._served_only:
            self._served_only, self._is_changing = wanted, True

    def recover(self) -> None:
        """If the last change was cut short, makes the books anew, with all requests that have not ended waiting.

        It may itself be cut short, and is then done again.
        """
        if not self._is_changing:
            return
        self._pipeline.drop()
        lost = self._arena.is_lost
        if lost:
            self._arena.renew()
        unfinished = self._to_be_served(self._outputs.roll_back())
        self._kv.start_over()
        self._scheduler.start_over(unfinished)
        what = "the KV arena was lost, and it and the books" if lost else "the books"
        log.warning("%s are made anew; %d unfinished requests are computed again", what, len(unfinished))
        self._is_changing = False

    def _to_be_served(self, unfinished: list[Request]) -> list[Request]:
        if self._served_only is None:
            return unfinished
        for request in unfinished:
            if request not in self._served_only:
                request.status, request.num_computed_tokens = RequestStatus.WAITING, 0
        return [request for request in unfinished if request in self._served_only]
