"""The endpoints: from a request to an answer."""

import asyncio
import contextlib
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.entrypoints.openai_api.asked import Asked, sort_fields
from fineserve_jax.entrypoints.openai_api.bodies import ENDPOINTS
from fineserve_jax.entrypoints.openai_api.json_objects import decode_object
from fineserve_jax.entrypoints.server.asking import check_model, tokens_of
from fineserve_jax.entrypoints.server.description import description
from fineserve_jax.entrypoints.server.page import PAGE, PAGE_HEADERS
from fineserve_jax.entrypoints.server.server_metrics import live_view
from fineserve_jax.entrypoints.server.service import Service
from fineserve_jax.entrypoints.server.wire import EventStream, Json, while_connected
from fineserve_jax.errors import RequestError
from fineserve_jax.request.sampling_params import SamplingParams

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Endpoints:
    """The functions that answer, each a path.

    Args:
        service: that they answer with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: Request) -> ASGIApp:
        """/v1/chat/completions and /v1/completions."""
        service, form = self._service, ENDPOINTS[request.url.path]
        service.check_open()
        name, service_class = service.who_asks(request)
        body = await service.body_of(request)
        asking = await service.read(form, body, service_class)
        with contextlib.ExitStack() as held:
            held.enter_context(service.pressure.admitted(asking.tickets, name, service_class))
            if not asking.is_streamed:
                return Json(await while_connected(request.receive, service.whole(asking)))
            return EventStream(service.events(asking), service.config.stall_timeout_s, held.pop_all())

    async def models(self, request: Request) -> Response:
        """/v1/models."""
        self._service.who_asks(request)
        return Json({"object": "list", "data": [self._entry(served) for served in self._models().values()]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME."""
        self._service.who_asks(request)
        return Json(self.entry(request.path_params["name"]))

    def entry(self, name: str) -> dict[str, Any]:
        """What is told of a model. Raises `ApiError` for one that is not served."""
        models = self._models()
        check_model(models, name)
        return self._entry(models[name])

    def _models(self) -> dict[str, KnownModel]:
        """Those that are served now."""
        return dict(self._service.llm.intake.models)

    def _entry(self, served: KnownModel) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "fineserve-jax",
            "max_model_len": served.max_seq_len,
            "kv_precisions": list(served.formats),
            "kv_precision": served.config.kv_precision,
            "weights": served.model.weights,
        }

    async def tokenize(self, request: Request) -> Response:
        """/tokenize: a prompt or messages as token ids."""
        self._service.who_asks(request)
        return Json(await asyncio.to_thread(self._tokens_of, await self._service.body_of(request)))

    def _tokens_of(self, body: bytes) -> dict[str, Any]:
        fields = sort_fields(decode_object(body, "the body", "invalid_json"), "chat")
        if fields["sampling"] or fields["echo"] or fields["options"].model_fields_set - {"model"}:
            raise RequestError(
                "/tokenize takes model, a prompt or messages, and how those are rendered; leave the rest out"
            )
        engine, asked = self._service.llm.intake, Asked(form="chat", **fields)
        tokens = tokens_of(engine, asked, SamplingParams(), self._service.config.own_chat_templates)
        max_seq_len = engine.served(asked.options.model).max_seq_len
        return {"count": len(tokens), "max_model_len": max_seq_len, "tokens": tokens}

    # -- for everybody -------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """/health: 200 as long as requests are answered."""
        self._service.check_open()
        return Json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """/metrics, for Prometheus."""
        service = self._service
        stats = await service.stats.get()
        return Response(service.metrics.text(stats, service.pressure.wait_s()), media_type=METRICS_TYPE)

    async def live(self, request: Request) -> Response:
        """/live: what the page shows."""
        service = self._service
        stats = await service.stats.get()
        if stats is None:
            return Json(None)
        return Json(live_view(stats, service.metrics.targets, service.pressure.wait_s()))

    async def page(self, request: Request) -> Response:
        """/: the page."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def openapi(self, request: Request) -> Response:
        """/openapi.json: the description of all this."""
        classes = self._service.classes
        return Json(description(self._models(), bool(classes.classes), classes.has_admin))
