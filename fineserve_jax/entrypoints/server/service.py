"""What the endpoints share: the engine, who may ask, how many, and what is counted of it."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request

from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.entrypoints.openai_api.answers import LATE, STATUS, completion_body, timing_of, usage_of
from fineserve_jax.entrypoints.openai_api.asked import SamplingDefaults
from fineserve_jax.entrypoints.openai_api.fields import Form
from fineserve_jax.entrypoints.openai_api.logprobs import echo_of, logprob_entries
from fineserve_jax.entrypoints.server.asking import Asking, read_asking
from fineserve_jax.entrypoints.server.classes import ServiceClass, ServiceClasses
from fineserve_jax.entrypoints.server.errors import ApiError, api_error
from fineserve_jax.entrypoints.server.pressure import Pressure
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.entrypoints.server.server_metrics import LatestStats, ServerMetrics
from fineserve_jax.entrypoints.server.streaming import END, Chunks, event
from fineserve_jax.entrypoints.server.wire import read_body
from fineserve_jax.errors import EngineError
from fineserve_jax.request.request import FinishReason

log = logging.getLogger(__name__)


class Service:
    """Answers requests with an engine.

    Args:
        llm: the engine.
        config: what the server bears.
        classes: who may ask for what.
        sampling: fields of `SamplingParams` for requests that do not set them.

    Raises:
        ConfigError: classes that name what the engine does not serve.
        RequestError: bad values in `sampling`.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        config: ServerConfig | None = None,
        classes: ServiceClasses | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.llm, self.config = llm, config or ServerConfig()
        self.classes = classes or ServiceClasses({})
        self.classes.check_formats(llm.intake.served_formats)
        self.metrics = ServerMetrics()
        self.pressure = Pressure(llm.loop, self.config.max_waiting, self.config.max_wait_s)
        self.stats = LatestStats(llm.stats)
        self.is_draining = False
        self.is_starting = self.config.warm_up
        self.created = int(time.time())
        self._defaults = SamplingDefaults(sampling)
        self._closing: asyncio.Task[None] | None = None

    # -- the beginning -------------------------------------------------------------------------------------------

    async def warm_up(self) -> None:
        """Compiles what requests need that name no KV precision, or one that their class names; until then nobody is
        let in."""
        if self.is_starting:
            begun, named = time.perf_counter(), self.classes.kv_precisions
            num_programs = await self.llm.warm_up(named)
            log.info("%d programs were made ready in %.1f s", num_programs, time.perf_counter() - begun)
            self.is_starting = False

    # -- the end -------------------------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """Lets nobody else in. What is being answered goes on for `drain_s`, and then ends with an error."""
        if not self.is_draining:
            self.is_draining = True
            self._closing = asyncio.create_task(self._close_later())

    async def _close_later(self) -> None:
        await asyncio.sleep(self.config.drain_s)
        await self.llm.close()

    def check_open(self) -> None:
        """Raises `ApiError` if nobody can be answered any more."""
        if self.is_draining:
            message = "the server is about to end; ask another one"
            raise ApiError(message, "server_draining", 503, {"Connection": "close", "Retry-After": "5"})
        if self.is_starting:
            message = "the server is starting, and compiles its programs; come again when /health says 200"
            raise ApiError(message, "starting", 503, {"Retry-After": "5"})
        try:
            self.llm.loop.check_usable()
        except EngineError as error:
            raise ApiError(str(error), "engine_fault", 503) from None

    # -- answers -------------------------------------------------------------------------------------------------

    def who_asks(self, request: Request) -> tuple[str, ServiceClass | None]:
        """Raises `ApiError` for whoever may not."""
        return self.classes.of(request.headers.get("authorization"))

    async def body_of(self, request: Request) -> bytes:
        """See `read_body`."""
        return await read_body(request, self.config.max_body_bytes, self.config.read_timeout_s)

    async def read(self, form: Form, body: bytes, service_class: ServiceClass | None) -> Asking:
        """See `read_asking`; on another thread, since prompts may be long."""
        inbox = self.llm.loop.inbox()
        own = self.config.own_chat_templates
        return await asyncio.to_thread(
            read_asking, self.llm.intake, self._defaults, inbox, form, body, service_class, own
        )

    async def whole(self, asking: Asking) -> dict[str, Any]:
        """The body of an answer. Raises what a prompt ended with."""
        outputs = await self.llm.loop.outputs(asking.receiver, asking.tickets)
        self.note(asking.tickets, outputs)
        for ticket in asking.tickets:
            check_ended_well(ticket)
        tokenizers = [ticket.prepared.served.tokenizer for ticket in asking.tickets]
        entries = [
            [logprob_entries(tokenizer, sample.token_ids, sample.logprobs) for sample in output.outputs]
            for tokenizer, output in zip(tokenizers, outputs, strict=True)
        ]
        echoes = [
            echo_of(output, ticket.prompt, tokenizer, asking.echoes)
            for output, ticket, tokenizer in zip(outputs, asking.tickets, tokenizers, strict=True)
        ]
        body = completion_body(
            asking.form, secrets.token_hex(12), int(time.time()), outputs, entries, echoes, asking.callable_names
        )
        return {**body, **used_of(outputs)}

    async def events(self, asking: Asking) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer; an error is one, and then the last."""
        num_samples = sum(ticket.prepared.sampling.n for ticket in asking.tickets)
        model = asking.tickets[0].prepared.served.name
        token, now = secrets.token_hex(12), int(time.time())
        chunks = Chunks(asking.form, token, now, model, asking.tells_usage, asking.callable_names)
        try:
            if opening := b"".join(chunks.opening(num_samples)):
                yield opening
            async with contextlib.aclosing(self.llm.loop.pieces(asking.receiver, asking.tickets)) as pieces:
                async for found in pieces:
                    if events := b"".join(_events_of(chunks, found)):
                        yield events
            outputs = [ticket.output() for ticket in asking.tickets]
            self.note(asking.tickets, outputs)
            usage = [chunks.usage(usage_of(outputs), used_of(outputs))] if asking.tells_usage else []
            yield b"".join([*usage, END])
        except Exception as error:
            told = api_error(error)
            if told.code == "internal_error":
                log.error("a stream failed", exc_info=error)
            yield event(told.body)

    def note(self, tickets: Sequence[Ticket], outputs: Sequence[RequestOutput]) -> None:
        """Counts what tickets gave."""
        for ticket, output in zip(tickets, outputs, strict=True):
            self.metrics.note_output(output, ticket.prepared.options)


def _events_of(chunks: Chunks, found: list[tuple[Ticket, Any]]) -> Iterator[bytes]:
    """Of what came since the last time. Raises what a sample ended with, if that is an error."""
    for ticket, piece in found:
        if piece.error is not None:
            raise piece.error
        if piece.finish_reason is FinishReason.LATE:
            raise ApiError(LATE, "late", STATUS["late"])
        yield from chunks.chunks(ticket, piece)


def check_ended_well(ticket: Ticket) -> None:
    """Raises what a sample ended with, if that is an error."""
    for sample in ticket.samples:
        if sample.error is not None:
            raise sample.error
        if sample.finish_reason is FinishReason.LATE:
            raise ApiError(LATE, "late", STATUS["late"])


def used_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """What is told of how an answer was made, besides what OpenAI's API has: precisions and times."""
    tokens: dict[str, int] = {}
    for output in outputs:
        for name, count in output.kv_tokens.items():
            tokens[name] = tokens.get(name, 0) + count
    timing = timing_of([output.metrics for output in outputs])
    return {"kv_precision": outputs[0].kv_precision, "kv_tokens": tokens, "timing": timing}
