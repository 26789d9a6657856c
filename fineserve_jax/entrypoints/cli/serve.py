"""`fineserve-jax serve`: the OpenAI-compatible server."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import (
    ConfigFlag,
    EngineFlags,
    ModelFlags,
    SamplingFlags,
    Settings,
    flags_of,
    settle,
)
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.errors import ConfigError
from fineserve_jax.fleet import Plan, read_plan
from fineserve_jax.fleet.remote.ray_serve import RayServeOptions, serve_plan

if TYPE_CHECKING:
    ServerFlags: TypeAlias = Mapping[str, Any]
    RayFlags: TypeAlias = Mapping[str, Any]
else:
    ServerFlags = flags_of(ServerConfig)
    RayFlags = flags_of(RayServeOptions)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    *,
    server: ServerFlags,
    model: ModelFlags = (),
    config: ConfigFlag = None,
    plan: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")] = None,
    ray: Switch = False,
    ray_options: RayFlags,
    engine: EngineFlags,
    sampling: SamplingFlags,
) -> None:
    """Serve models to OpenAI's client and others like it, each request with its KV cache in the precision it asks for.

    Endpoints are those of OpenAI for answers, embeddings and models, /tokenize, /health and /metrics; at / is a page
    that shows how the server stands, at /openapi.json the description. Needs pip install 'fineserve-jax[serve]'.
    SIGTERM lets nobody else in, and ends the server when all is answered.

    Args:
        model: alias, .gguf file, Hugging Face directory or converted directory. Several models are given as
            NAME=MODEL or NAME=MODEL:WEIGHTS, e.g. small=smollm2-135m:int8, and requests name theirs as "model".
        config: YAML file with `model` or `models` and defaults for the options below.
        plan: YAML file with the engines to be served from, their models, devices and settings, as `fineserve-jax
            place` writes it; instead of models and of the engine's options.
        ray: have the engines of the plan run as deployments of Ray Serve on a Ray cluster, which replaces those that
            die; what is asked comes here. Needs pip install 'fineserve-jax[ray-serve]'.
    """
    if ray_options and not ray:
        raise ConfigError(f"{min(ray_options)} says where on a Ray cluster, and there is no --ray; give it, too")
    if ray and plan is None:
        raise ConfigError("--ray runs the engines of a plan; give --plan, too")
    settings, planned = _settings(config, model, engine, sampling, plan)
    try:
        from fineserve_jax.entrypoints.server.classes import read_classes
        from fineserve_jax.entrypoints.server.run import listen, run_server
        from fineserve_jax.entrypoints.server.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError("serve needs Starlette and uvicorn: pip install 'fineserve-jax[serve]'") from None
    server_config = ServerConfig(**server)
    classes = read_classes(server_config.classes)
    if planned is None:
        engine_config = settings.config()
        if twice := engine_config.quotas.keys() & classes.quotas.keys():
            raise ConfigError(f"{min(twice)!r} has a quota in the engine's settings and in the classes; leave one out")
        quotas = {"quotas": {**engine_config.quotas, **classes.quotas}}
        given: dict[str, Any] = {
            "model": settings.model or None,
            "models": settings.models or None,
            **settings.engine,
            **quotas,
        }
    else:
        given = {"plan": planned.with_quotas(classes.quotas)}
    if server_config.host not in LOOPBACK and not classes.classes:
        print(f"warning: anybody who reaches {server_config.host} is served; --classes asks for keys", file=sys.stderr)
    listening = listen(server_config)  # before the model is loaded, which takes long
    from fineserve_jax.async_llm import AsyncLLM

    with contextlib.ExitStack() as held:
        if ray:
            given["plan"] = held.enter_context(
                contextlib.closing(serve_plan(given["plan"], RayServeOptions(**ray_options)))
            )
        run_server(Service(AsyncLLM(**given), server_config, classes, settings.sampling), listening)


def _settings(
    config: Path | None, model: Sequence[str], engine: EngineFlags, sampling: SamplingFlags, plan: Path | None
) -> tuple[Settings, Plan | None]:
    """What the flags say, and the plan if there is one, which then says all of models and engines."""
    settings = settle(config, model, engine, sampling)
    if plan is None:
        return settings, None
    if model or any(value != () for value in engine.values()) or settings.engine:
        raise ConfigError("models and the engine's options beside --plan, which says them itself; change the plan")
    return settings, read_plan(plan)
