"""Moves requests that wait for an engine that is short of memory to one that begins them much sooner."""

import logging
import threading
import weakref
from collections.abc import Mapping
from typing import Protocol

from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.errors import EngineError
from fineserve_jax.fleet.replica import EngineReplica
from fineserve_jax.scheduler.router import find_moves

log = logging.getLogger(__name__)

LOOKS_EVERY_S = 0.1
MOST_MOVES = 8
"""Requests that are moved before all is looked at again."""


class Balanced(Protocol):
    """Engines between which tickets can be moved; `Fleet` is one."""

    @property
    def replicas(self) -> Mapping[str, EngineReplica]: ...

    def move(self, ticket: Ticket, source: str, target: str) -> bool:
        """Gives a ticket that waits to another engine."""


class Balancer:
    """Looks at the queues of a fleet for as long as something waits, on a thread of its own.

    Args:
        fleet: whose requests are moved; it may be gone before this.
    """

    def __init__(self, fleet: Balanced) -> None:
        self._fleet = weakref.ref(fleet)
        self._has_work, self._is_closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Something was submitted."""
        fleet = self._fleet()
        if self._thread is None and fleet is not None and len(fleet.replicas) > 1:
            self._thread = threading.Thread(target=self._run, name="fineserve balancer", daemon=True)
            self._thread.start()
        self._has_work.set()

    def close(self) -> None:
        """Ends the thread, without waiting for it."""
        self._is_closed.set()
        self._has_work.set()

    def _run(self) -> None:
        while not self._is_closed.wait(LOOKS_EVERY_S):
            self._has_work.wait()
            fleet = self._fleet()
            if fleet is None or self._is_closed.is_set():
                return
            self._has_work.clear()
            try:
                if balance(fleet):
                    self._has_work.set()
            except EngineError:  # an engine was closed meanwhile
                return
            except Exception:
                log.exception("requests could not be moved between engines; they wait where they are")


def balance(fleet: Balanced) -> bool:
    """Moves what is worth moving, once; whether something waits that may be worth moving later."""
    queues = {name: replica.queue(MOST_MOVES) for name, replica in fleet.replicas.items()}
    if not any(queue.waiting for queue in queues.values()):
        return any(replica.tickets() for replica in fleet.replicas.values())
    for ticket, source, target in find_moves(
        queues, lambda name, ticket, before: fleet.replicas[name].wait_s(ticket, before), MOST_MOVES
    ):
        fleet.move(ticket, source, target)
    return True
