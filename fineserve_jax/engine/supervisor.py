"""What lets an engine go on after steps that fail, whoever calls it: its loop, or a batch job."""

import logging
import traceback
from collections.abc import Iterable

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.isolation import Isolation
from fineserve_jax.errors import EngineError
from fineserve_jax.request.request import Request

log = logging.getLogger(__name__)


class Supervisor:
    """Has requests computed again after a step that failed, and ends those that steps fail with.

    Args:
        engine: that nobody else calls meanwhile.
        max_retries: see `Isolation`.
    """

    def __init__(self, engine: Engine, max_retries: int = 1) -> None:
        self.engine, self._max_retries = engine, max_retries
        self._isolation = Isolation(max_retries)

    @property
    def isolates(self) -> bool:
        """Whether some requests are served apart from all others, whom nobody should join."""
        return self._isolation.served is not None

    def note_progress(self, requests: Iterable[Request]) -> None:
        """These requests got a token, or have ended."""
        if self._isolation.note_progress(requests):
            self._serve()

    def go_on_after(self, error: BaseException) -> None:
        """A step has failed, or something between two steps: its requests are computed again, in groups until it is
        known which of them steps fail with. Such a one ends with an `EngineError`, whose cause is the error.

        Raises whatever keeps the engine from going on.
        """
        log.warning("a step failed", exc_info=error)
        traceback.clear_frames(error.__traceback__)  # their variables hold on to the arena
        unfinished = {request: None for request in self.engine.detokenizers if request.finish_reason is None}
        computing = [request for request in self.engine.computing if request in unfinished]
        if suspects := computing or self._isolation.served or list(unfinished):
            culprit = self._isolation.note_failure(suspects)
            if culprit is not None:
                failed = EngineError(f"the engine failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                self.engine.fail(culprit, failed)
            self._serve()
        self.engine.recover()

    def reset(self) -> None:
        """Nobody is suspected any more, and all may be served."""
        self._isolation = Isolation(self._max_retries)
        self._serve()

    def _serve(self) -> None:
        self.engine.scheduler.row_limit = self._isolation.row_limit
        self.engine.serve_only(self._isolation.served)
