"""What is sent between a fleet and an engine in another process. Times are by the clock of who sends them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.tickets import Piece
from fineserve_jax.errors import EngineError, FineServeError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.quotas import Quotas


@dataclass(frozen=True, slots=True)
class Books:
    """What requests are checked against, as an engine has it when it serves none.

    Attributes:
        models: without their weights.
        kv: the host's half of the cache.
        waits: a pickled `WaitPredictor`.
    """

    config: EngineConfig
    models: dict[str, KnownModel]
    kv: KVManager
    quotas: Quotas
    waits: bytes


class Submission(NamedTuple):
    """A prompt for the engine to answer.

    Attributes:
        number: of the ticket, in what is sent of it from now on.
        kept: see `PreparedRequest`; what is not asked for, but set by who asks.
        age_s: since it came.
        wants_pieces: see `Ticket`.
    """

    number: int
    token_ids: list[int]
    sampling: SamplingParams
    options: RequestOptions
    kept: Mapping[str, Any]
    age_s: float
    wants_pieces: bool


class Abort(NamedTuple):
    """Nobody wants a ticket any more."""

    number: int


class Position(NamedTuple):
    """How far a sample has come; see `Request`."""

    status: RequestStatus
    num_computed_tokens: int
    num_preemptions: int
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float | None


class TicketNews(NamedTuple):
    """What came of a ticket since it was told of before.

    Attributes:
        positions: of its samples, of those that the engine has begun to queue.
        pieces: see `Ticket.take_pieces`.
        endings: with the last news, what is set of each sample when it ends: the fields of `Request` by name.
        is_done, error: see `Ticket`.
    """

    number: int
    positions: list[Position]
    pieces: list[Piece]
    endings: list[dict[str, Any]]
    is_done: bool
    error: BaseException | None


class News(NamedTuple):
    """What came since the last time.

    Attributes:
        now_s: when it was sent.
        waits: a pickled `WaitPredictor`, now and then; None: the last one is good enough.
        is_short: see `Scheduler.is_short`.
    """

    now_s: float
    tickets: list[TicketNews]
    waits: bytes | None
    is_short: bool


def portable(error: BaseException) -> BaseException:
    """An error that can be raised in another process: the user's as it is, any other by its words."""
    if isinstance(error, FineServeError):
        return error
    return EngineError(f"the engine failed: {type(error).__name__}: {error}")
