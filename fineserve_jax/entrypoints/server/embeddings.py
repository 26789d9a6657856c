"""The endpoint for embeddings: vectors of texts, pooled hidden states of the models that are served."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fineserve_jax.engine.async_loop import AsyncInbox
from fineserve_jax.engine.embedding import Embedding, PromptEmbedding
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.entrypoints.openai_api.embeddings import (
    MAX_INPUTS,
    EmbeddingFields,
    check_dimensions,
    embedding_fields,
    embeddings_body,
)
from fineserve_jax.entrypoints.openai_api.fields import FieldError
from fineserve_jax.entrypoints.openai_api.json_objects import decode_object
from fineserve_jax.entrypoints.server.asking import check_model
from fineserve_jax.entrypoints.server.classes import ServiceClass
from fineserve_jax.entrypoints.server.errors import ApiError, api_error
from fineserve_jax.entrypoints.server.service import Service, check_ended_well, used_of
from fineserve_jax.entrypoints.server.wire import while_connected


@dataclass(frozen=True, slots=True)
class _Asking:
    """A request that the engine can answer; its receiver is held as long as it is waited for."""

    fields: EmbeddingFields
    call: Embedding
    receiver: AsyncInbox
    tickets: list[Ticket]


class Embeddings:
    """Answers /v1/embeddings.

    Args:
        service: whose models make the vectors.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def embed(self, request: Request) -> Response:
        """/v1/embeddings."""
        service = self._service
        service.check_open()
        name, service_class = service.who_asks(request)
        body = await service.body_of(request)
        asking = await asyncio.to_thread(self._read, service.llm.loop.inbox(), body, service_class)
        with service.pressure.admitted(asking.tickets, name, service_class):
            return await while_connected(request.receive, self._answer(asking))

    def _read(self, receiver: AsyncInbox, body: bytes, service_class: ServiceClass | None) -> _Asking:
        """A request, checked by all that can be known before it waits."""
        config, engine = self._service.config, self._service.llm.intake
        inputs, fields, options = embedding_fields(decode_object(body, "the body", "invalid_json"))
        if len(inputs) > (most := min(MAX_INPUTS, config.max_waiting)):
            raise FieldError(f"the request has {len(inputs)} inputs; it may have {most}")
        check_model(dict(engine.models), options.model)
        served = engine.served(options.model)
        check_dimensions(fields, served.name, served.model.config.hidden_size)
        pooling = fields.pooling or config.embedding_pooling
        settings, normalize = served.model.pooling, fields.normalize
        if settings is None and normalize is None:
            normalize = True  # as OpenAI's are
        if settings is None and pooling is None:
            raise FieldError(
                f"{served.name!r} is a language model and not made for embeddings: nothing says which of its hidden "
                "states are the vector of a text; say pooling: mean or last, in the request or at the server's start "
                "(--embedding-pooling)",
                "unsupported_model",
            )
        options = options if service_class is None else service_class.apply(options)
        call = Embedding(inputs, pooling, normalize, options, {})
        return _Asking(fields, call, receiver, call.tickets(engine, receiver))

    async def _answer(self, asking: _Asking) -> Response:
        """Raises what an input ended with."""
        service, tickets = self._service, asking.tickets
        outputs = await service.llm.loop.outputs(asking.receiver, tickets)
        service.note(tickets, outputs)
        for index, ticket in enumerate(tickets):
            try:
                check_ended_well(ticket)
            except Exception as error:
                known = api_error(error)
                raise ApiError(f"input {index}: {known}", known.code, known.status) from error
        found, model = asking.call.result(tickets), outputs[0].model
        return await asyncio.to_thread(_response, asking.fields, model, found, used_of(outputs))


def _response(fields: EmbeddingFields, model: str, found: list[PromptEmbedding], used: Mapping[str, Any]) -> Response:
    """Raises `ApiError` for an input that has no vector."""
    for index, one in enumerate(found):
        if one.error is not None:
            raise ApiError(f"input {index}: {one.error}", "engine_fault", 500)
    return Response(embeddings_body(fields, model, found, used), media_type="application/json")
