"""The engine on a thread of its own: callers on any threads hand in tickets, and are told what becomes of them.

    caller's thread                             the loop's thread, which alone touches the engine
    ticket = Ticket(prepared, receiver) ------> queue its samples
                                                step, step, ...
    receiver.notify([ticket]) <---------------- tokens came, or it is done
    ticket.take(), ticket.output()
    loop.abort([ticket]) ---------------------> its memory is free before the next step

Signals reach only the main thread, so an interrupt ends somebody's waiting and never a step.
"""

import atexit
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from fineserve_jax.engine.backlog import Forecast, forecast
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.model_settings import model_sources
from fineserve_jax.engine.supervisor import Supervisor
from fineserve_jax.engine.tickets import Receiver, Ticket, notify
from fineserve_jax.errors import ConfigError, EngineError
from fineserve_jax.request.request import Request, RequestStatus

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineLoop:
    """Serves tickets with an engine that nobody else uses meanwhile. All methods may be called by any thread.

    The thread begins with the first ticket or call, and steps only while there are tickets.

    Args:
        engine: to be served from.

    Attributes:
        is_up: whether the engine is there, as in one process it always is.
    """

    is_up = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()  # its `put` may be called by finalizers, too
        self._tickets: dict[Request, Ticket] = {}  # by each sample that has not ended
        self._to_abort: list[Request] = []
        self._held_back: list[Ticket] | None = None  # while all others are served to their ends
        # Those that want statistics, and how many tickets each of them has.
        self._watchers: weakref.WeakKeyDictionary[Receiver, int] = weakref.WeakKeyDictionary()
        self._supervisor = Supervisor(engine)
        self._lock = threading.RLock()  # reentrant: a finalizer may run while its thread holds it
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._process = os.getpid()

    # -- for any thread ------------------------------------------------------------------------------------------

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Lets prompts wait for their turn, in this order.

        Raises:
            EngineError: the loop is closed, or belongs to another process.
        """
        self._send(functools.partial(self._add, tickets))

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Ends those that have not ended; returns at once, and frees their memory before the next step."""
        # Closed is looked at first: at exit a generator may be finalized when the modules are gone.
        if self._is_closed or self._process != os.getpid():
            return
        with self._lock:
            if not self._is_closed:
                self._commands.put(functools.partial(self._abort, tickets))

    def abort_with(self, receiver: Receiver, tickets: Sequence[Ticket]) -> None:
        """Aborts the tickets when nobody holds their receiver any more, should an interrupt have kept the caller from
        doing so."""
        weakref.finalize(receiver, self.abort, tickets).atexit = False

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises when it is called between two steps.

        Raises:
            EngineError: see `submit`.
        """
        if threading.current_thread() is self._thread:
            return function()
        answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def command() -> None:
            try:
                answers.put((function(), None))
            except BaseException as error:
                answers.put((None, error))

        self._send(command)
        result, error = answers.get()
        if error is not None:
            raise error
        return result

    def call_when_idle(self, function: Callable[[], T], *, abort: bool = False) -> T:
        """`call`, when no ticket is being served: those that come meanwhile wait.

        Args:
            abort: end those that are being served, with the finish reason "abort"; else they are served to their ends.
        """

        def when_idle() -> T:
            self._drain(abort)
            return function()

        return self.call(when_idle)

    def each(self, function: Callable[[Engine], T], model: str | None = None) -> list[T]:
        """`call` of a function of the engine, as of the only one; see `TicketLoop`."""
        return [self.call(lambda: function(self.engine))]

    def each_when_idle(
        self, function: Callable[[Engine], T], model: str | None = None, *, abort: bool = False
    ) -> list[T]:
        """`call_when_idle` of a function of the engine, as of the only one; see `TicketLoop`."""
        return [self.call_when_idle(lambda: function(self.engine), abort=abort)]

    def forecast(self, tickets: Iterable[Ticket], model: str | None, priority: int) -> Forecast:
        """What a request of that priority has to expect behind these tickets."""
        return forecast(self.engine.scheduler, tickets, priority)

    def withdraw(self, ticket: Ticket) -> float | None:
        """Takes a ticket back that waits, as if it had not come; its receiver is not told. When it came, by the
        engine's clock; None, and nothing has changed, if it has begun or ended."""

        def take_back() -> float | None:
            if not ticket.has_not_begun or not all(sample in self._tickets for sample in ticket.samples):
                return None
            for sample in ticket.samples:
                del self._tickets[sample]
                self.engine.withdraw(sample)
            self._watch(ticket, -1)
            return ticket.samples[0].times.arrival_s

        return self.call(take_back)

    def load_model(
        self, name: str, source: str | Path | Mapping[str, Any], engines: Sequence[int] | None = None
    ) -> None:
        """`Engine.load_model`, whose weights are read on the caller's thread while steps go on."""
        self.check_usable()
        if engines is not None:
            raise ConfigError(f"engines={[*engines]} are those of a plan, and this is one engine; leave them out")
        (settings,) = model_sources({name: source}).values()
        model = self.engine.loading.read(name, settings)
        self.call(lambda: self.engine.add_model(name, model, settings))

    def unload_model(self, name: str, *, abort: bool = False) -> None:
        """`Engine.unload_model`, when none of the model's tickets is being served. Others are served meanwhile; those
        of the model that come are refused.

        Args:
            abort: end those that are being served, with the finish reason "abort"; else they are served to their ends.
        """

        def unload() -> None:
            with self.engine.loading.refusing(name):
                self._end_all(name, abort)
                self.engine.unload_model(name)

        self.call(unload)

    def close(self) -> None:
        """Ends the thread after the step that it computes. Tickets that are left end with an `EngineError`."""
        self.close_without_waiting()
        if self._process == os.getpid() and self._thread not in (None, threading.current_thread()):
            self._thread.join()

    def close_without_waiting(self) -> None:
        """`close` for finalizers, which may run anywhere and must not wait for another thread."""
        if self._process != os.getpid():
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(self._fail_all_as_closed)

    def check_usable(self) -> None:
        """Raises `EngineError` if the loop is closed, or belongs to another process."""
        if self._process != os.getpid():
            raise EngineError(
                f"this engine was made by process {self._process}, of which this one is a fork; neither its thread nor "
                "its device is there after a fork: make the engine in the process that uses it, or use the "
                "multiprocessing start method 'spawn'"
            )
        if self._is_closed:
            raise EngineError("this engine is closed; make another one")

    def _send(self, command: Callable[[], None]) -> None:
        self.check_usable()  # in a fork, the lock may be held by nobody who is there
        if threading.current_thread() is self._thread:
            raise EngineError("the engine was called from within one of its steps, which would wait for itself")
        with self._lock:
            self.check_usable()
            if self._thread is None:
                # A daemon, so that the interpreter does not wait for it before `_close_all` has run.
                self._thread = threading.Thread(target=self._run, name="fineserve engine", daemon=True)
                _LOOPS.add(self)
                self._thread.start()
            self._commands.put(command)

    # -- the loop's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._is_closed and self._commands.empty()):
            try:
                if not self._tickets and not self._to_abort:
                    self._commands.get()()  # waits
                while not self._commands.empty():
                    self._commands.get()()
                self._step()
            except BaseException as error:  # a step calls policies and formats of others; nobody is left waiting
                self._go_on_after(error)

    def _step(self) -> None:
        self._carry_out_aborts()
        if self._tickets:
            advanced = self.engine.step()
            self._supervisor.note_progress(advanced)
            self._deliver(advanced)

    def _end_all(self, model: str | None, abort: bool) -> None:
        """Serves the tickets of a model, or of all, to their ends, or ends them. Others are served meanwhile."""
        if abort:
            for request in [request for request in self._tickets if model in (None, request.model)]:
                self.engine.abort(request)
                self._deliver([request])
        while self._to_abort or any(model in (None, request.model) for request in self._tickets):
            try:
                while not self._commands.empty():
                    self._commands.get()()
                self._step()
            except BaseException as error:  # as in `_run`
                self._go_on_after(error)

    def _drain(self, abort: bool) -> None:
        """Serves all tickets to their ends, or ends them; others are held back until the next command."""
        is_first, held_back = self._held_back is None, self._held_back or []
        self._held_back = held_back
        try:
            self._end_all(None, abort)
        finally:
            if is_first:  # and not within another one's
                self._held_back = None
                self._commands.put(functools.partial(self._add, held_back))

    def _add(self, tickets: Iterable[Ticket]) -> None:
        if self._held_back is not None:
            self._held_back.extend(tickets)
            return
        for ticket in tickets:
            try:
                samples = self.engine.queue(ticket.prepared)
                ticket.begin(samples, [self.engine.detokenizers[request] for request in samples])
            except BaseException as error:
                ticket.error, ticket.is_done = error, True
                notify(ticket.receiver, [ticket], self._abort)
                continue
            self._tickets |= dict.fromkeys(samples, ticket)
            self._watch(ticket, +1)

    def _abort(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            own = [request for request in ticket.samples if self._tickets.pop(request, None) is not None]
            self._to_abort += own
            if own:
                self._leave(ticket)
        self._carry_out_aborts()

    def _carry_out_aborts(self) -> None:
        while self._to_abort:
            request = self._to_abort[-1]
            self.engine.abort(request)
            self.engine.release(request)
            self._supervisor.note_progress([request])
            self._to_abort.pop()

    def _leave(self, ticket: Ticket) -> None:
        """Nothing more will come of the ticket."""
        ticket.is_done = True
        self._watch(ticket, -1)

    def _watch(self, ticket: Ticket, difference: int) -> None:
        receiver = ticket.receiver
        if receiver is not None and receiver.wants_stats:
            self._watchers[receiver] = self._watchers.get(receiver, 0) + difference
            if not self._watchers[receiver]:
                del self._watchers[receiver]

    def _deliver(self, advanced: Iterable[Request]) -> None:
        """Tells receivers of requests that got a token or ended."""
        news: dict[Receiver, list[Ticket]] = {}
        if watchers := list(self._watchers):
            stats = self.engine.stats()  # before a ticket is taken off the books: what follows cannot fail
            for watcher in watchers:
                watcher.show(stats)
        for request in advanced:
            ticket = self._tickets.get(request)
            if ticket is None:
                continue
            if request.status is RequestStatus.FINISHED:
                del self._tickets[request]
                self.engine.release(request)
                if ticket.note_finished():
                    self._leave(ticket)
                elif not ticket.wants_pieces:
                    continue
            elif not ticket.wants_pieces:
                continue
            receiver = ticket.receiver
            if receiver is not None and ticket.announce():
                news.setdefault(receiver, []).append(ticket)
        for receiver, tickets in news.items():
            notify(receiver, tickets, self._abort)

    # -- what goes wrong -----------------------------------------------------------------------------------------

    def _go_on_after(self, error: BaseException) -> None:
        try:
            self._supervisor.go_on_after(error)
            self._deliver([request for request in self._tickets if request.status is RequestStatus.FINISHED])
        except BaseException as fatal:
            fatal.__context__ = error
            log.error("the engine cannot go on with its requests", exc_info=fatal)
            self._fail_all(f"the engine failed, and could not go on: {type(fatal).__name__}: {fatal}", fatal)

    def _fail_all(self, message: str, cause: BaseException | None = None) -> None:
        """Everybody who waits is told; the engine forgets all requests, and begins anew with the next ticket."""
        tickets = dict.fromkeys(self._tickets.values())
        for request in [*self._tickets, *self._to_abort]:
            self.engine.release(request)
        self._tickets, self._to_abort, self._watchers = {}, [], weakref.WeakKeyDictionary()
        self._supervisor.reset()
        for ticket in tickets:
            ticket.error = EngineError(message)
            ticket.error.__cause__ = cause
            ticket.is_done = True
            notify(ticket.receiver, [ticket], self._abort)

    def _fail_all_as_closed(self) -> None:
        left = dict.fromkeys(self._tickets.values())
        for ticket in left:
            ticket.error = EngineError("the engine was closed before this was answered")
        self._abort(left)
        for ticket in left:
            notify(ticket.receiver, [ticket], self._abort)


_LOOPS: "weakref.WeakSet[EngineLoop]" = weakref.WeakSet()


def _close_all() -> None:
    """At exit, while threads can still end by themselves."""
    for loop in list(_LOOPS):
        loop.close()


atexit.register(_close_all)  # behind JAX's own, which is imported by now, and so called before it
