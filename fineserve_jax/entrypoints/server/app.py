"""The application: which path is answered by which function, and what is done with errors."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fineserve_jax.entrypoints.server.admin import Admin
from fineserve_jax.entrypoints.server.embeddings import Embeddings
from fineserve_jax.entrypoints.server.endpoints import Endpoints
from fineserve_jax.entrypoints.server.errors import ApiError, api_error
from fineserve_jax.entrypoints.server.service import Service
from fineserve_jax.entrypoints.server.wire import Json
from fineserve_jax.errors import FineServeError

GONE = 499
"""Status that is counted of a client that has left, as nginx has it; nobody gets it."""


def make_app(service: Service) -> Starlette:
    """The server as an ASGI application."""
    endpoints = Endpoints(service)
    admin = Admin(service, endpoints)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.complete, methods=["POST"]),
            Route("/v1/completions", endpoints.complete, methods=["POST"]),
            Route("/v1/embeddings", Embeddings(service).embed, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/admin/models", admin.load, methods=["POST"]),
            Route("/admin/models/{name:path}", admin.unload, methods=["DELETE"]),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
            Route("/live", endpoints.live),
            Route("/openapi.json", endpoints.openapi),
            Route("/", endpoints.page),
        ],
        exception_handlers={
            FineServeError: _told,
            HTTPException: _told_by_starlette,
            ClientDisconnect: _gone,
            Exception: _told_and_logged,
        },
    )
    app.add_middleware(_Counted, service=service)
    return app


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # set while the request is on its way
                self._metrics.note_response(route.path if route is not None else "", message["status"])
            await send(message)

        await self._app(scope, receive, counting)


async def _told(request: Request, error: Exception) -> Response:
    known = api_error(error)
    return Json(known.body, known.status, known.headers)


async def _told_by_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}; see /openapi.json for what there is"
    return await _told(request, ApiError(message, code, error.status_code, error.headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _told_and_logged(request: Request, error: Exception) -> Response:
    return await _told(request, error)  # Starlette raises it again, for uvicorn to log
