"""What serves tickets, as those who hand them in see it: the loop of an engine, or of several behind a router."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fineserve_jax.engine.backlog import Forecast
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.tickets import Receiver, Ticket

T = TypeVar("T")


class TicketLoop(Protocol):
    """All methods may be called by any thread."""

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Lets prompts wait for their turn, in this order. Raises `EngineError` if it is closed."""

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Ends those that have not ended; returns at once."""

    def abort_with(self, receiver: Receiver, tickets: Sequence[Ticket]) -> None:
        """Aborts the tickets when nobody holds their receiver any more."""

    def forecast(self, tickets: Iterable[Ticket], model: str | None, priority: int) -> Forecast:
        """What a request that comes now has to expect.

        Args:
            tickets: that come before it, of those that are served.
            model: its own; None: any.
            priority: its own.
        """

    def each(self, function: Callable[[Engine], T], model: str | None = None) -> list[T]:
        """What the function gives for each engine, or for each that serves a model, between two of its steps."""

    def each_when_idle(
        self, function: Callable[[Engine], T], model: str | None = None, *, abort: bool = False
    ) -> list[T]:
        """`each`, when no ticket is being served; see `EngineLoop.call_when_idle`."""

    def load_model(
        self, name: str, source: str | Path | Mapping[str, Any], engines: Sequence[int] | None = None
    ) -> None:
        """See `Engine.load_model`. `engines`: which of a plan's are to have it; None: the only one."""

    def unload_model(self, name: str, *, abort: bool = False) -> None:
        """See `EngineLoop.unload_model`."""

    def check_usable(self) -> None:
        """Raises `EngineError` if it is closed, or belongs to another process."""

    def close(self) -> None:
        """Ends its threads. Tickets that are left end with an `EngineError`."""

    def close_without_waiting(self) -> None:
        """`close` for finalizers, which may run anywhere and must not wait for another thread."""
