"""An engine in another process, and the tickets that it has, as they are seen here."""

import dataclasses
import pickle
from collections.abc import Mapping, Sequence

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.prepare import PreparedRequest, named_model, prepare_request
from fineserve_jax.engine.request_text import Known
from fineserve_jax.engine.tickets import Piece, Ticket
from fineserve_jax.errors import FineServeError
from fineserve_jax.fleet.remote.messages import Books, News, Position, TicketNews
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request, RequestStatus, RequestTimes
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.waits import WaitPredictor


class RemotePredictions:
    """See `Predictions`: the last that came."""

    def __init__(self, waits: bytes) -> None:
        self.waits: WaitPredictor = pickle.loads(waits)
        self.is_short = False

    def note(self, news: News) -> None:
        """More has come."""
        if news.waits is not None:
            self.waits = pickle.loads(news.waits)
        self.is_short = news.is_short


class RemoteEngine:
    """What requests are checked against, and predictions are made from; see `KnownEngine`.

    Args:
        books: of the engine.
    """

    def __init__(self, books: Books) -> None:
        self.books, self.scheduler = books, RemotePredictions(books.waits)

    def adopt(self, books: Books) -> None:
        """The engine's models have changed, or it was replaced."""
        self.scheduler = RemotePredictions(books.waits)  # first: requests of new models are predicted with it
        self.books = books

    @property
    def config(self) -> EngineConfig:
        return self.books.config

    @property
    def models(self) -> Mapping[str, KnownModel]:
        return self.books.models

    @property
    def kv(self) -> KVManager:
        return self.books.kv

    @property
    def max_batch_size(self) -> int:
        return self.config.max_batch_size

    @property
    def served_formats(self) -> tuple[str, ...]:
        return self.config.served_formats

    def served(self, model: str | None = None) -> KnownModel:
        """See `Engine.served`."""
        return named_model(self.models, model)

    def prepare(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
        pooled_from: int | None = None,
    ) -> PreparedRequest:
        """See `Engine.prepare`."""
        books = self.books  # which may be others from one moment to the next
        return prepare_request(books.models, books.kv, books.quotas, token_ids, sampling, options, pooled_from)


class RemoteText:
    """See `SampleText`: decoded where the engine is."""

    def __init__(self) -> None:
        self.known = Known(0)
        self._parts: list[str] = []
        self._num_taken = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def take(self) -> str:
        stop = len(self._parts)
        taken = "".join(self._parts[self._num_taken : stop])
        self._num_taken = stop
        return taken

    def note(self, piece: Piece) -> None:
        """More has come; called when the request has it."""
        self._parts.append(piece.text)
        self.known = Known(self.known.num_tokens + len(piece.token_ids), piece.finish_reason is not None)


class MirroredTicket:
    """A ticket that an engine in another process serves.

    Args:
        number: in what is sent.
        arrival_s: when it came, by this process's clock.
        deaths: engines that have died with it.
    """

    def __init__(self, ticket: Ticket, number: int, arrival_s: float, deaths: int) -> None:
        self.ticket, self.number, self.arrival_s, self.deaths = ticket, number, arrival_s, deaths
        self._texts: list[RemoteText] = []

    @property
    def was_told(self) -> bool:
        """Whether somebody may have been told of a token already, which cannot be taken back."""
        return self.ticket.wants_pieces and any(text.known.num_tokens for text in self._texts)

    def forget(self) -> None:
        """The engine has died: the ticket waits, as it did when it came, and keeps its place by when that was."""
        ticket = self.ticket
        ticket.prepared = dataclasses.replace(ticket.prepared, arrival_s=self.arrival_s)
        for sample in ticket.samples:  # which stay until the next engine has others: somebody may be reading them
            sample.status, sample.num_computed_tokens = RequestStatus.WAITING, 0
            sample.times = RequestTimes(self.arrival_s)
            del sample.token_ids[sample.num_prompt_tokens :], sample.logprobs[:]

    def note(self, news: TicketNews, offset_s: float) -> bool:
        """Brings the ticket up to what is told; whether there is something for its receiver.

        Args:
            offset_s: from the engine's clock to this process's.
        """
        ticket = self.ticket
        if news.positions and not self._texts:
            self._begin(len(news.positions))
        for sample, position in zip(ticket.samples, news.positions, strict=False):
            _set_position(sample, position, offset_s)
        for piece in news.pieces:
            self._note_piece(piece)
        for sample, ending in zip(ticket.samples, news.endings, strict=False):
            for name, value in ending.items():
                setattr(sample, name, value)
        if news.is_done:
            ticket.error = news.error
            ticket.is_done = True
        return news.is_done or (ticket.wants_pieces and bool(news.pieces))

    def _begin(self, count: int) -> None:
        ticket = self.ticket
        samples = [
            ticket.prepared.request(f"{self.number}-{index}", self.number, self.arrival_s, 0, index)
            for index in range(count)
        ]
        self._texts = [RemoteText() for _ in samples]
        ticket.begin(samples, self._texts)

    def _note_piece(self, piece: Piece) -> None:
        sample = self.ticket.samples[piece.sample]
        sample.token_ids.extend(piece.token_ids)
        sample.logprobs.extend(piece.logprobs or ())
        if piece.finish_reason is not None:
            sample.finish_reason = piece.finish_reason
            sample.error = piece.error if isinstance(piece.error, FineServeError) else None
        self._texts[piece.sample].note(piece)


def _set_position(sample: Request, position: Position, offset_s: float) -> None:
    """Times are set once: a clock that is read over a network is never read the same twice."""
    sample.status, sample.num_computed_tokens = position.status, position.num_computed_tokens
    sample.num_preemptions, times = position.num_preemptions, sample.times
    for name in ("admitted_s", "first_token_s", "finished_s"):
        found = getattr(position, name)
        if found is not None and getattr(times, name) is None:
            setattr(times, name, found + offset_s)
