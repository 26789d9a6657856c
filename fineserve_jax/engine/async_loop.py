"""The engine loop for asyncio's tasks: what a step has for those of an event loop is handed over in one go."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from fineserve_jax.engine.backlog import Forecast
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.engine.ticket_loop import TicketLoop
from fineserve_jax.engine.tickets import Piece, Ticket

T = TypeVar("T")
Pieces = list[tuple[Ticket, Piece]]


class AsyncLoop:
    """Serves tickets of tasks, on any number of event loops. A task that is cancelled ends its tickets.

    Args:
        loop: on whose thread, or threads, the engine is.
    """

    def __init__(self, loop: TicketLoop) -> None:
        self._loop = loop
        self._inboxes: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, AsyncInbox] = (
            weakref.WeakValueDictionary()
        )

    def inbox(self) -> "AsyncInbox":
        """The receiver for tickets of the running event loop; there as long as somebody holds it."""
        event_loop = asyncio.get_running_loop()
        inbox = self._inboxes.get(event_loop)
        if inbox is None:
            inbox = self._inboxes[event_loop] = AsyncInbox(event_loop)
        return inbox

    async def served(self, inbox: "AsyncInbox", tickets: Sequence[Ticket]) -> None:
        """Waits until all of the tickets, which are for that inbox, are done."""
        async with contextlib.aclosing(self._news(inbox, tickets)) as news:
            while not all(ticket.is_done for ticket in tickets):
                await anext(news)

    async def outputs(self, inbox: "AsyncInbox", tickets: Sequence[Ticket]) -> list[RequestOutput]:
        """The outputs of tickets for that inbox, when all are done. Raises what one of them ended with."""
        await self.served(inbox, tickets)
        return [ticket.output() for ticket in tickets]

    async def texts(self, inbox: "AsyncInbox", ticket: Ticket) -> AsyncGenerator[str, None]:
        """The text of a ticket of one sample, as it becomes certain. Raises what it ended with."""
        async with contextlib.aclosing(self._news(inbox, [ticket])) as news:
            async for _ in news:
                piece, is_done = ticket.take()
                if piece:
                    yield piece
                if is_done:
                    break
        ticket.check()

    async def pieces(self, inbox: "AsyncInbox", tickets: Sequence[Ticket]) -> AsyncGenerator[Pieces, None]:
        """What comes of tickets that want pieces, a list each time that something did. A sample's own error is in its
        last piece; raises what a ticket as a whole ended with.

        Nothing is kept for a reader that is slower than the engine: it gets what it has missed in one piece.
        """
        left = list(tickets)
        async with contextlib.aclosing(self._news(inbox, tickets)) as news:
            async for _ in news:
                is_done = [ticket.is_done for ticket in left]  # before anything is taken: what is taken then is all
                found = [(ticket, piece) for ticket in left for piece in ticket.take_pieces()]
                for ticket in left:
                    if ticket.error is not None:
                        raise ticket.error
                if found:
                    yield found
                left = [ticket for ticket, done in zip(left, is_done, strict=True) if not done]
                if not left:
                    break

    async def _news(self, inbox: "AsyncInbox", tickets: Sequence[Ticket]) -> AsyncGenerator[None, None]:
        """Hands the tickets in, and yields whenever there is news of one; whoever leaves, ends them."""
        with inbox.expecting(tickets) as news:
            try:
                self._loop.submit(tickets)
                while True:
                    await news.wait()
                    news.clear()
                    yield
            finally:
                self._loop.abort(tickets)

    async def each(self, function: Callable[[Engine], T]) -> list[T]:
        """What the function gives for each engine between two of its steps; see `TicketLoop.each`."""
        return await asyncio.to_thread(self._loop.each, function)

    def forecast(self, tickets: Iterable[Ticket], model: str | None, priority: int) -> Forecast:
        """See `TicketLoop.forecast`."""
        return self._loop.forecast(tickets, model, priority)

    def check_usable(self) -> None:
        """See `EngineLoop.check_usable`."""
        self._loop.check_usable()


class AsyncInbox:
    """The receiver for the tasks of an event loop. Its methods, but for `notify`, are called on that loop's thread."""

    wants_stats = False

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self._event_loop = event_loop
        self._expected: dict[Ticket, asyncio.Event] = {}

    def notify(self, tickets: Sequence[Ticket]) -> None:
        self._event_loop.call_soon_threadsafe(self._wake, tickets)  # raises if the event loop is closed

    def show(self, stats: EngineStats) -> None:
        """Nobody is shown statistics."""

    def _wake(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if ticket in self._expected:
                self._expected[ticket].set()

    @contextlib.contextmanager
    def expecting(self, tickets: Sequence[Ticket]) -> Iterator[asyncio.Event]:
        """Set whenever there is news of one of the tickets."""
        news = asyncio.Event()
        self._expected |= dict.fromkeys(tickets, news)
        try:
            yield news
        finally:
            for ticket in tickets:
                del self._expected[ticket]
