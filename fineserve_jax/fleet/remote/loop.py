"""This side of an engine in another process: hands tickets over, and those of an engine that has died back."""

import itertools
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from fineserve_jax.engine.backlog import Forecast, forecast
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.tickets import Receiver, Ticket, notify
from fineserve_jax.errors import ConfigError, EngineError
from fineserve_jax.fleet.remote.link import EngineLink, LinkLostError
from fineserve_jax.fleet.remote.messages import Abort, Books, News, Submission
from fineserve_jax.fleet.remote.mirror import MirroredTicket, RemoteEngine
from fineserve_jax.fleet.replica import what_was_asked

log = logging.getLogger(__name__)
T = TypeVar("T")
Command = Submission | Abort

MOST_DEATHS = 2
"""Engines that may die with a request before it is not tried again: it may be what kills them."""

IDLE_S = 1.0
"""Seconds that an engine without tickets waits before it says that there is no news."""

AGAIN_S = 0.5
"""Seconds between attempts to reach an engine."""


class RemoteLoop:
    """See `ReplicaLoop`. An engine that dies is waited for: whoever replaces it serves what has not begun to be told.

    Args:
        name: of the engine.
        link: to it; it must be there.
        replaced_within_s: that tickets wait for an engine to be replaced, before they fail.
        deaths: of engines, by the tickets that they had; of a fleet, for all of its loops.
    """

    def __init__(
        self,
        name: str,
        link: EngineLink,
        replaced_within_s: float = 600.0,
        deaths: MutableMapping[Ticket, int] | None = None,
    ) -> None:
        self.name, self._link, self._replaced_within_s = name, link, replaced_within_s
        self._changes: dict[str, Mapping[str, Any] | str | Path | None] = {}  # models loaded, and unloaded: None
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # reentrant: a finalizer may run while its thread holds it
        self._tickets: dict[int, MirroredTicket] = {}
        self._number_of: dict[Ticket, int] = {}
        self._deaths = weakref.WeakKeyDictionary() if deaths is None else deaths
        self._commands: SimpleQueue[tuple[str, Command] | None] = SimpleQueue()  # each with its session
        self._up, self._is_closed = threading.Event(), False
        self._take_back: Callable[[str, Iterable[Ticket]], None] | None = None
        self._session, self._lost_session = uuid.uuid4().hex, ""
        self.engine = RemoteEngine(self._link.call("connect", self._session))
        self._up.set()
        self._threads = [
            threading.Thread(target=run, name=f"fineserve {name}", daemon=True)
            for run in (self._receive, self._send_all)
        ]
        for thread in self._threads:
            thread.start()

    def give_back_to(self, take_back: Callable[[str, Iterable[Ticket]], None]) -> None:
        """Who gets tickets of an engine that has died, by its name; else they wait for its replacement."""
        self._take_back = take_back

    # -- tickets -------------------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """See `TicketLoop`."""
        with self._lock:
            self.check_usable()
            for ticket in tickets:
                arrival_s, number = ticket.prepared.arrival_s, next(self._numbers)
                arrival_s = time.monotonic() if arrival_s is None else arrival_s
                mirrored = MirroredTicket(ticket, number, arrival_s, self._deaths.get(ticket, 0))
                self._tickets[number], self._number_of[ticket] = mirrored, number
                if self.is_up:  # else it is sent when the engine is replaced
                    self._put(_submission(mirrored))

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """See `TicketLoop`."""
        with self._lock:
            for ticket in tickets:
                if (number := self._number_of.pop(ticket, None)) is not None:
                    del self._tickets[number]
                    self._put(Abort(number))
                ticket.is_done = True  # also if it is on its way to another engine

    def abort_with(self, receiver: Receiver, tickets: Sequence[Ticket]) -> None:
        """See `TicketLoop`."""
        weakref.finalize(receiver, self.abort, tickets).atexit = False

    def withdraw(self, ticket: Ticket) -> float | None:
        """See `EngineLoop.withdraw`; the time is by this process's clock."""
        with self._lock:
            number, session = self._number_of.get(ticket), self._session
        if number is None or not self.is_up:
            return None
        try:
            is_withdrawn = self._link.call("withdraw", session, number)
        except (LinkLostError, EngineError):
            return None  # whoever waits for news finds the engine dead, too
        with self._lock:
            if not is_withdrawn or self._number_of.get(ticket) != number:
                return None
            del self._number_of[ticket]
            return self._tickets.pop(number).arrival_s

    def forecast(self, tickets: Iterable[Ticket], model: str | None, priority: int) -> Forecast:
        """See `TicketLoop`."""
        return forecast(self.engine.scheduler, tickets, priority)

    # -- the engine ----------------------------------------------------------------------------------------------

    def each(self, function: Callable[[Engine], T], model: str | None = None) -> list[T]:
        """See `TicketLoop`. While the engine is being replaced, it is waited for."""
        while True:
            self.check_usable()
            if not self._up.wait(self._replaced_within_s):
                raise EngineError(f"{self.name} has died, and was not replaced in {self._replaced_within_s:g} s")
            try:
                found: list[T] = self._link.call("each", function)
                return found
            except LinkLostError:
                time.sleep(AGAIN_S)

    def each_when_idle(
        self, function: Callable[[Engine], T], model: str | None = None, *, abort: bool = False
    ) -> list[T]:
        """Raises `ConfigError`: an engine that replaces another one would know nothing of it."""
        raise ConfigError(
            "weights are not updated, nor engines put to sleep, where these are in other processes: what replaces one "
            "would not know of it; load the weights as a further model, or change the plan"
        )

    def load_model(
        self, name: str, source: str | Path | Mapping[str, Any], engines: Sequence[int] | None = None
    ) -> None:
        """See `EngineLoop.load_model`; the source is read where the engine is, and what replaces it has the model."""
        self._change(name, source, "load_model", name, source)

    def unload_model(self, name: str, *, abort: bool = False) -> None:
        """See `EngineLoop.unload_model`."""
        self._change(name, None, "unload_model", name, abort)

    def _change(self, name: str, change: Mapping[str, Any] | str | Path | None, method: str, *arguments: Any) -> None:
        self.check_usable()
        try:
            if not self.is_up:
                raise LinkLostError
            self.engine.adopt(self._link.call(method, *arguments))
        except LinkLostError:
            raise EngineError(f"{self.name} has died and is being replaced; {name!r} is as it was, try again") from None
        self._changes[name] = change

    def check_usable(self) -> None:
        """Raises `EngineError` if it is closed."""
        if self._is_closed:
            raise EngineError("this engine is closed; make another one")

    def close(self) -> None:
        """Ends the engine's process."""
        self.close_without_waiting()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * IDLE_S)  # one that waits for a replacement would wait longer
        self._link.close()

    def close_without_waiting(self) -> None:
        """Ends the threads; tickets that are left fail. The engine's process ends with `close`, or with the cluster's
        connection."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._commands.put(None)
            left, self._tickets, self._number_of = list(self._tickets.values()), {}, {}
        self._fail(left, "the engine was closed before this was answered")

    # -- the threads ---------------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Commands in their order, as many at once as there are. What an engine that dies was sent is sent anew."""
        while (first := self._commands.get()) is not None:
            entries, session = [first], self._session
            while not self._commands.empty() and (further := self._commands.get()) is not None:
                entries.append(further)
            commands = [command for sent_in, command in entries if sent_in == session]
            try:
                if commands:
                    self._link.call("send", session, commands)
            except Exception as error:
                log.warning("%s did not take %d commands: %s", self.name, len(commands), error)
                self._lost_session = session  # nobody knows which of them it has: all begins anew
            if self._is_closed:
                return

    def _put(self, command: Command) -> None:
        self._commands.put((self._session, command))

    def _receive(self) -> None:
        while not self._is_closed:
            try:
                self._note(self._link.call("news", self._session, IDLE_S))
                if self._lost_session == self._session:
                    raise LinkLostError("it did not take what it was sent")
            except Exception as error:
                if self._is_closed:
                    return
                log.warning("%s is lost, and will be replaced: %s", self.name, error)
                self._give_back()
                self._await_replacement()

    def _note(self, news: News) -> None:
        offset_s = time.monotonic() - news.now_s
        self.engine.scheduler.note(news)
        told: dict[Receiver, list[Ticket]] = {}
        for one in news.tickets:
            with self._lock:  # so that nobody aborts it meanwhile
                mirrored = self._tickets.get(one.number)
                if mirrored is None:
                    continue
                ticket = mirrored.ticket
                is_new = mirrored.note(one, offset_s)
                if one.is_done:
                    del self._tickets[one.number], self._number_of[ticket]
            receiver = ticket.receiver
            if is_new and receiver is not None and ticket.announce():
                told.setdefault(receiver, []).append(ticket)
        for receiver, tickets in told.items():
            notify(receiver, tickets, self.abort)

    def _fail(self, left: Iterable[MirroredTicket], message: str) -> None:
        for mirrored in left:
            ticket = mirrored.ticket
            ticket.error, ticket.is_done = EngineError(message), True
            notify(ticket.receiver, [ticket], self.abort)

    # -- what dies -----------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Ends what cannot begin anew, and hands the rest back."""
        with self._lock:
            self._up.clear()
            self._session = uuid.uuid4().hex
            left, self._tickets, self._number_of = list(self._tickets.values()), {}, {}
        hopeless = [one for one in left if one.was_told]
        unheard = [one for one in left if not one.was_told]
        deadly = [one for one in unheard if one.deaths + 1 >= MOST_DEATHS]
        again = [one for one in unheard if one.deaths + 1 < MOST_DEATHS]
        self._fail(hopeless, f"{self.name} died in the middle of this answer; ask again")
        self._fail(deadly, f"{MOST_DEATHS} engines died with this request, which is not tried again")
        for one in again:
            self._deaths[one.ticket] = one.deaths + 1
            one.forget()
        take_back = self._take_back or (lambda _, tickets: self.submit(list(tickets)))
        take_back(self.name, [one.ticket for one in again])

    def _await_replacement(self) -> None:
        deadline_s = time.monotonic() + self._replaced_within_s
        while not self._is_closed:
            try:
                self._begin_with(self._link.call("connect", self._session))
                return
            except Exception as error:
                log.warning("%s is not there yet: %s", self.name, error)
            if time.monotonic() > deadline_s:
                with self._lock:
                    left, self._tickets, self._number_of = list(self._tickets.values()), {}, {}
                self._fail(left, f"{self.name} died, and was not replaced in {self._replaced_within_s:g} s")
            time.sleep(AGAIN_S)

    def _begin_with(self, books: Books) -> None:
        """Gives a new engine the models that the last one had, and what waits for it."""
        for name, source in self._changes.items():
            if name in books.models:
                books = self._link.call("unload_model", name, True)
            if source is not None:
                books = self._link.call("load_model", name, source)
        with self._lock:
            self.engine.adopt(books)
            self._up.set()
            for mirrored in self._tickets.values():
                self._put(_submission(mirrored))
        log.warning("%s is there again", self.name)


def _submission(mirrored: MirroredTicket) -> Submission:
    ticket = mirrored.ticket
    token_ids, sampling, options, kept = what_was_asked(ticket.prepared)
    age_s = time.monotonic() - mirrored.arrival_s
    kept = {**kept, "arrival_s": None}  # which is by this process's clock
    return Submission(mirrored.number, token_ids, sampling, options, kept, age_s, ticket.wants_pieces)
