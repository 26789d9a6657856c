"""The endpoints for whoever runs the server: models are loaded and unloaded while it serves."""

import logging

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.entrypoints.openai_api.json_objects import decode_object
from fineserve_jax.entrypoints.server.endpoints import Endpoints
from fineserve_jax.entrypoints.server.errors import ApiError
from fineserve_jax.entrypoints.server.service import Service
from fineserve_jax.entrypoints.server.wire import Json
from fineserve_jax.errors import ConfigError, ModelLoadError
from fineserve_jax.validation import shown

log = logging.getLogger(__name__)


class ModelToLoad(ModelSource):
    """What is asked for: a model as an entry of `models`, and what requests are to call it.

    Attributes:
        name: for `model` of requests.
        engines: which engines of a plan are to have it, by their numbers from 0; None: the only one.
    """

    name: str = Field(min_length=1)
    engines: tuple[int, ...] | None = None


class Admin:
    """The functions that answer, each a path.

    Args:
        service: whose models they are.
        endpoints: that tell of a model.
    """

    def __init__(self, service: Service, endpoints: Endpoints) -> None:
        self._service, self._endpoints = service, endpoints

    async def load(self, request: Request) -> Response:
        """POST /admin/models: loads a model, and tells of it when requests may name it."""
        self._check(request)
        given = decode_object(await self._service.body_of(request), "the body", "invalid_json")
        try:
            asked = ModelToLoad(**{str(key): value for key, value in given.items()})
            source = asked.model_dump(exclude={"name", "engines"})
            await self._service.llm.load_model(asked.name, source, engines=asked.engines)
        except (ConfigError, ModelLoadError) as error:
            raise ApiError(str(error), "model_not_loadable", 400) from None
        log.info("model %r is loaded from %s", asked.name, asked.model)
        return Json(self._endpoints.entry(asked.name))

    async def unload(self, request: Request) -> Response:
        """DELETE /admin/models/NAME: answers when the model's requests have ended and it is gone."""
        self._check(request)
        name, abort = request.path_params["name"], request.query_params.get("abort", "false")
        if abort not in ("true", "false"):
            raise ApiError(f"abort={shown(abort)} is neither true nor false; give one of them", "invalid_request", 400)
        await self._service.llm.unload_model(name, abort=abort == "true")
        log.info("model %r is unloaded", name)
        return Json({"id": name, "object": "model", "deleted": True})

    def _check(self, request: Request) -> None:
        self._service.classes.check_admin(request.headers.get("authorization"))
        self._service.check_open()
