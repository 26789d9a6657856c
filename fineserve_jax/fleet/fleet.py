"""Engines that are asked, and served from, as if they were one: each ticket goes to the one that the router chooses."""

import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fineserve_jax.engine.backlog import Forecast, forecast
from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.prepare import PreparedRequest, named_model
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import ConfigError, EngineError, RequestError
from fineserve_jax.fleet.balancer import Balancer
from fineserve_jax.fleet.replica import EngineReplica, ReplicaLoop, asked_of, prepared_by, what_was_asked
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.router import Router

log = logging.getLogger(__name__)
T = TypeVar("T")


class Fleet:
    """See `Intake` and `TicketLoop`, both of which it is. Any thread may call it.

    Args:
        loops: of engines, by name; those that serve the same model are its replicas.

    Attributes:
        replicas: by name.
    """

    def __init__(self, loops: Mapping[str, ReplicaLoop]) -> None:
        self.replicas = {name: EngineReplica(name, loop) for name, loop in loops.items()}
        self._router = Router(self.replicas)
        self._places: weakref.WeakKeyDictionary[Ticket, EngineReplica] = weakref.WeakKeyDictionary()
        self._moving: dict[Ticket, bool] = {}  # whether they were aborted meanwhile
        self._loading = threading.Lock()
        self._lock = threading.RLock()  # reentrant: a finalizer may run while its thread holds it
        self._balancer = Balancer(self)

    # -- what is asked -------------------------------------------------------------------------------------------

    @property
    def models(self) -> dict[str, KnownModel]:
        """All that are served, each as one of its engines has it."""
        listed = [dict(replica.engine.models) for replica in self.replicas.values()]
        return {name: served for models in reversed(listed) for name, served in models.items()}

    @property
    def max_batch_size(self) -> int:
        """Of all engines together."""
        return sum(replica.engine.config.max_batch_size for replica in self.replicas.values())

    @property
    def served_formats(self) -> tuple[str, ...]:
        """KV formats that some engine serves."""
        listed = (replica.engine.config.served_formats for replica in self.replicas.values())
        return tuple(dict.fromkeys(name for formats in listed for name in formats))

    def served(self, model: str | None = None) -> KnownModel:
        """The model of that name; None stands for the only one. Raises `RequestError`."""
        return named_model(self.models, model)

    def prepare(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
        pooled_from: int | None = None,
    ) -> PreparedRequest:
        """Checks a request as one of the engines that serve its model would, see `Engine.prepare`. Raises
        `RequestError` if all of them refuse it, as the first does."""
        name, refusals = self.served((options or RequestOptions()).model).name, list[RequestError]()
        for replica in self.replicas.values():
            if name in replica.models:
                try:
                    return replica.engine.prepare(token_ids, sampling, options, pooled_from)
                except RequestError as error:
                    refusals.append(error)
        raise refusals[0] if refusals else RequestError(f"model={name!r} was unloaded meanwhile; choose another one")

    # -- tickets -------------------------------------------------------------------------------------------------

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """See `EngineLoop.submit`; each ticket goes where its targets are predicted to be met, and soonest.

        Raises:
            RequestError: no engine that is left serves it.
        """
        self.check_usable()
        for ticket in tickets:
            with self._lock:
                self._send(ticket, self._there_for(ticket))
        self._balancer.wake()

    def take_back(self, name: str, tickets: Iterable[Ticket]) -> None:
        """Sends tickets of an engine that has died to others, or lets them wait there until it is replaced."""
        self._router.forget(name)
        for ticket in tickets:
            with self._lock:
                if ticket.is_done:  # aborted meanwhile
                    continue
                self.replicas[name].forget(ticket)
                try:
                    self._send(ticket, self._there_for(ticket))
                except (RequestError, EngineError) as error:  # the others do not take it, or are closed
                    log.warning("a request waits until %s is replaced: %s", name, error)
                    self._give(ticket, self.replicas[name])

    def _there_for(self, ticket: Ticket) -> list[str]:
        """Replicas that a ticket can be sent to: not to those that are being replaced, unless no other serves it."""
        model = ticket.prepared.served.name
        there = [name for name, replica in self.replicas.items() if replica.loop.is_up and model in replica.models]
        return there or list(self.replicas)

    def _send(self, ticket: Ticket, among: Sequence[str]) -> None:
        """Submits a ticket to one of these replicas."""
        name = self._router.route(asked_of(ticket.prepared), among)
        replica = self.replicas[name]
        try:
            ticket.prepared = self._prepared_for(replica, ticket.prepared)
        except RequestError:
            others = [other for other in among if other != name]
            if not others:
                raise
            self._send(ticket, others)
            return
        self._give(ticket, replica)

    def _give(self, ticket: Ticket, replica: EngineReplica) -> None:
        replica.note_sent(ticket)
        self._places[ticket] = replica
        replica.loop.submit([ticket])

    def _prepared_for(self, replica: EngineReplica, prepared: PreparedRequest) -> PreparedRequest:
        if replica.engine.models.get(prepared.served.name) is prepared.served:
            return prepared
        return prepared_by(replica.engine, *what_was_asked(prepared))

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """See `EngineLoop.abort`."""
        with self._lock:
            for ticket in tickets:
                if ticket in self._moving:
                    self._moving[ticket] = True
                if (replica := self._places.get(ticket)) is not None:
                    replica.loop.abort([ticket])

    def abort_with(self, receiver: Receiver, tickets: Sequence[Ticket]) -> None:
        """See `EngineLoop.abort_with`."""
        weakref.finalize(receiver, self.abort, tickets).atexit = False

    def move(self, ticket: Ticket, source: str, target: str) -> bool:
        """Gives a ticket that waits to another engine, as if it had come there when it came; whether it was given."""
        with self._lock:
            if self._places.get(ticket) is not self.replicas[source]:
                return False
            try:
                prepared = self._prepared_for(self.replicas[target], ticket.prepared)
            except RequestError:
                return False
            self._moving[ticket] = False
        try:
            arrival_s = self.replicas[source].loop.withdraw(ticket)  # waits for a step: without the lock
        except BaseException:
            with self._lock:
                del self._moving[ticket]
            raise
        with self._lock:
            is_aborted = self._moving.pop(ticket)
            if arrival_s is None:
                return False
            self.replicas[source].forget(ticket)
            if is_aborted:
                return False
            ticket.prepared = dataclasses.replace(prepared, arrival_s=arrival_s)
            self._give(ticket, self.replicas[target])
        return True

    def forecast(self, tickets: Iterable[Ticket], model: str | None, priority: int) -> Forecast:
        """What a request that comes now, behind all of these tickets, has to expect where it waits least."""
        listed = list(tickets)
        found = []
        there = [replica for replica in self.replicas.values() if replica.loop.is_up]
        for replica in there or self.replicas.values():
            if model is None or model in replica.models:
                own = [ticket for ticket in listed if self._places.get(ticket) is replica]
                found.append(forecast(replica.engine.scheduler, own, priority))
        return min(found, key=lambda one: (one.wait_s, one.num_waiting), default=Forecast(0, 0.0))

    # -- the engines ---------------------------------------------------------------------------------------------

    def each(self, function: Callable[[Engine], T], model: str | None = None) -> list[T]:
        """What the function gives for each engine, or for each that serves a model, one after the other."""
        return [found for loop in self._loops(model) for found in loop.each(function)]

    def each_when_idle(
        self, function: Callable[[Engine], T], model: str | None = None, *, abort: bool = False
    ) -> list[T]:
        """`each`, when the engine serves no ticket; see `EngineLoop.call_when_idle`."""
        return [found for loop in self._loops(model) for found in loop.each_when_idle(function, abort=abort)]

    def _loops(self, model: str | None) -> list[ReplicaLoop]:
        name = None if model is None else self.served(model).name
        return [replica.loop for replica in self.replicas.values() if name is None or name in replica.models]

    def load_model(
        self, name: str, source: str | Path | Mapping[str, Any], engines: Sequence[int] | None = None
    ) -> None:
        """See `Engine.load_model`. If one of the engines cannot have it, none has.

        Args:
            engines: which are to have it, by their numbers in the plan; None: the only one.
        """
        self.check_usable()
        loops = self._numbered(f"load_model({name!r})", engines)
        with self._loading:
            if name in self.models:
                raise ConfigError(f"a model called {name!r} is served already; unload it, or choose another name")
            for count, loop in enumerate(loops):
                try:
                    loop.load_model(name, source)
                except BaseException:
                    for other in loops[:count]:
                        other.unload_model(name)
                    raise

    def _numbered(self, what: str, engines: Sequence[int] | None) -> list[ReplicaLoop]:
        loops = [replica.loop for replica in self.replicas.values()]
        if engines is None and len(loops) == 1:
            return loops
        numbers = range(len(loops))
        if not engines or len({*engines}) < len(engines) or not all(number in numbers for number in engines):
            given = "nothing says which engines" if engines is None else f"engines={[*engines]}"
            raise ConfigError(
                f"{what}: {given}; the plan has {len(loops)} engines, numbered from 0: give engines=[...], each once"
            )
        return [loops[number] for number in engines]

    def unload_model(self, name: str, *, abort: bool = False) -> None:
        """Takes a model out of all engines that serve it, see `EngineLoop.unload_model`."""
        for loop in self._loops(name):
            loop.unload_model(name, abort=abort)

    def check_usable(self) -> None:
        """Raises `EngineError` unless all engines are, but for those that are being replaced while others are there."""
        for replica in self.replicas.values():
            replica.loop.check_usable()
        if not any(replica.loop.is_up for replica in self.replicas.values()):
            raise EngineError("all engines have died and are being replaced; come again in a while")

    def close(self) -> None:
        """See `EngineLoop.close`."""
        self.close_without_waiting()
        for replica in self.replicas.values():
            replica.loop.close()

    def close_without_waiting(self) -> None:
        """See `EngineLoop.close_without_waiting`."""
        self._balancer.close()
        for replica in self.replicas.values():
            replica.loop.close_without_waiting()
