"""The engine's side: serves tickets that another process has, and tells it what becomes of them."""

import dataclasses
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.loop import EngineLoop
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.errors import EngineError
from fineserve_jax.fleet.remote.messages import Abort, Books, News, Position, Submission, TicketNews, portable
from fineserve_jax.fleet.replica import prepared_by
from fineserve_jax.request.request import Request

T = TypeVar("T")

PREDICTIONS_EVERY_S = 0.25
POSITIONS_EVERY_S = 0.1
"""Seconds after which news is sent although no token has come, as long as there are tickets."""

AT_THE_END = ("token_ids", "logprobs", "kv_precision", "kv_tokens", "scores", "pooling", "finish_reason")
"""What is set of a request when it has ended, besides its position, its times and its error."""


class Bell:
    """The receiver of all tickets: rings when there is news."""

    wants_stats = False

    def __init__(self) -> None:
        self.rung = threading.Event()

    def notify(self, tickets: Sequence[Ticket]) -> None:
        self.rung.set()

    def show(self, stats: EngineStats) -> None:
        """Nobody is shown statistics."""


class EngineHost:
    """Serves the tickets of one fleet at a time: who connects ends those of whoever did before. Any thread may call it.

    Args:
        engine: that nobody else uses.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.loop = engine, EngineLoop(engine)
        self._session = ""
        self._tickets: dict[int, Ticket] = {}
        self._refused: list[TicketNews] = []
        self._bell = Bell()
        self._telling, self._lock = threading.Lock(), threading.Lock()
        self._predicted_s = float("-inf")

    # -- what a fleet calls --------------------------------------------------------------------------------------

    def connect(self, session: str) -> Books:
        """Begins with a fleet that has no tickets here. `session`: that it names with all it asks for afterwards."""
        with self._lock:
            if session == self._session:  # asked again, since the first answer was long in coming
                return self._books()
            left, self._tickets, self._refused, self._session = list(self._tickets.values()), {}, [], session
            self._predicted_s = float("-inf")
        self.loop.abort(left)
        return self._books()

    def send(self, session: str, commands: Iterable[Submission | Abort]) -> None:
        """Carries commands out, in this order."""
        for command in commands:
            if isinstance(command, Submission):
                self._submit(session, command)
                continue
            with self._lock:
                self._check(session)
                aborted = self._tickets.pop(command.number, None)
            if aborted is not None:
                self.loop.abort([aborted])

    def news(self, session: str, patience_s: float) -> News:
        """Waits for news, and tells it; after `patience_s`, or a moment if there are tickets, that there is none."""
        with self._telling:
            with self._lock:
                self._check(session)
                wait_s = POSITIONS_EVERY_S if self._tickets else patience_s
            self._bell.rung.wait(wait_s)
            self._bell.rung.clear()  # before anything is read: what comes from here on rings again
            with self._lock:
                self._check(session)
                listed, told = list(self._tickets.items()), self._refused
                self._refused = []
            told = told + [_news_of(number, ticket) for number, ticket in listed]
            with self._lock:
                for one in told:
                    if one.is_done:
                        self._tickets.pop(one.number, None)
            return News(self.engine.clock(), told, self._predictions(), self.engine.scheduler.is_short)

    def withdraw(self, session: str, number: int) -> bool:
        """Takes a ticket back that has not begun; whether it was."""
        with self._lock:
            self._check(session)
            ticket = self._tickets.get(number)
        if ticket is None or self.loop.withdraw(ticket) is None:
            return False
        with self._lock:
            self._tickets.pop(number, None)
        return True

    def each(self, function: Callable[[Engine], T]) -> list[T]:
        """See `TicketLoop.each`."""
        return self.loop.each(function)

    def load_model(self, name: str, source: str | Path | Mapping[str, Any]) -> Books:
        """See `TicketLoop.load_model`."""
        self.loop.load_model(name, source)
        return self._books()

    def unload_model(self, name: str, abort: bool) -> Books:
        """See `TicketLoop.unload_model`."""
        self.loop.unload_model(name, abort=abort)
        return self._books()

    def check_health(self) -> None:
        """Raises `EngineError` if nothing can be served any more."""
        self.loop.check_usable()

    def close(self) -> None:
        """Ends the engine's thread."""
        self.loop.close()

    # -- their parts ---------------------------------------------------------------------------------------------

    def _check(self, session: str) -> None:
        if session != self._session:
            raise EngineError("another fleet has connected to this engine meanwhile")

    def _books(self) -> Books:
        def copied() -> Books:
            engine = self.engine
            models = {name: without_weights(model) for name, model in engine.models.items()}
            waits = pickle.dumps(engine.scheduler.waits)
            books = Books(engine.config, models, engine.kv, engine.scheduler.quotas, waits)
            return pickle.loads(pickle.dumps(books))  # between two steps

        return self.loop.call(copied)

    def _submit(self, session: str, submission: Submission) -> None:
        try:
            prepared = prepared_by(
                self.engine, submission.token_ids, submission.sampling, submission.options, submission.kept
            )
        except Exception as error:  # such as a model that was unloaded meanwhile
            with self._lock:
                self._check(session)
                self._refused.append(TicketNews(submission.number, [], [], [], True, portable(error)))
            self._bell.rung.set()
            return
        prepared = dataclasses.replace(prepared, arrival_s=self.engine.clock() - submission.age_s)
        ticket = Ticket(prepared, self._bell, wants_pieces=submission.wants_pieces)
        with self._lock:
            self._check(session)
            self._tickets[submission.number] = ticket
        self._bell.rung.set()
        self.loop.submit([ticket])

    def _predictions(self) -> bytes | None:
        now = time.monotonic()
        if now - self._predicted_s < PREDICTIONS_EVERY_S:
            return None
        try:
            found = pickle.dumps(self.engine.scheduler.waits)
        except RuntimeError:  # a table has grown under the copying: the next time will do
            return None
        self._predicted_s = now
        return found


def without_weights(model: KnownModel) -> KnownModel:
    """What can be sent of a model."""
    shell = dataclasses.replace(model.model, params={})
    return KnownModel(model.name, shell, model.config, model.formats, model.geometry, model.max_seq_len)


def _news_of(number: int, ticket: Ticket) -> TicketNews:
    is_done = ticket.is_done  # before anything is taken: what is taken then is all
    pieces = [
        piece if piece.error is None else piece._replace(error=portable(piece.error)) for piece in ticket.take_pieces()
    ]
    samples = ticket.samples
    endings = [_ending(sample) for sample in samples] if is_done and ticket.error is None else []
    error = None if ticket.error is None else portable(ticket.error)
    return TicketNews(number, list(map(_position, samples)), pieces, endings, is_done, error)


def _position(sample: Request) -> Position:
    times = sample.times
    return Position(
        sample.status,
        sample.num_computed_tokens,
        sample.num_preemptions,
        times.admitted_s,
        times.first_token_s,
        times.finished_s,
    )


def _ending(sample: Request) -> dict[str, Any]:
    error = None if sample.error is None else portable(sample.error)
    return {name: getattr(sample, name) for name in AT_THE_END} | {"error": error}
