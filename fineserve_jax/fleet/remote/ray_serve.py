"""A plan as deployments of Ray Serve: an engine each, with one replica, which Serve looks after and replaces."""

import asyncio
import logging
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from pydantic import Field

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.errors import ConfigError
from fineserve_jax.fleet.fleet import Fleet
from fineserve_jax.fleet.plan import EnginePlan, Plan
from fineserve_jax.fleet.remote.host import EngineHost
from fineserve_jax.fleet.remote.link import LinkLostError
from fineserve_jax.fleet.remote.loop import RemoteLoop
from fineserve_jax.fleet.remote.messages import portable
from fineserve_jax.validation import Validated

MOST_CALLS = 64
"""That an engine's process answers at once; those that wait for it to be idle, say, are among them."""

MOST_STARTS = 2
"""Attempts to make an engine when the plan is deployed, before what went wrong is told."""

SILENT_S = 60.0
"""Seconds after which an engine that says nothing, not even that there is nothing, is taken to be lost."""


class RayServeOptions(Validated):
    """Where the engines of a plan are on a Ray cluster.

    Attributes:
        ray_address: of a cluster, or "auto" for the one that this machine belongs to; None: one that is started on this
            machine and ends with the server.
        ray_gpus: GPUs that each device of an engine takes; None: one where the cluster has GPUs, else none.
        ray_cpus: CPUs that each engine takes.
        ray_health_s: seconds between looks at whether an engine is well.
        ray_replaced_within_s: seconds that requests wait for an engine to be replaced when no other serves their
            model; then they fail.
    """

    ray_address: str | None = None
    ray_gpus: float | None = Field(default=None, ge=0.0)
    ray_cpus: float = Field(default=1.0, ge=0.0)
    ray_health_s: float = Field(default=5.0, gt=0.0)
    ray_replaced_within_s: float = Field(default=600.0, gt=0.0)


class EngineDeployment:
    """What Ray Serve deploys: an engine in a process of its own.

    Args:
        sources: of its models.
        config: of the engine.
        num_devices: that it takes, of those that are given to the process.
        on_gpus: whether it was given GPUs, and so is not to compute elsewhere.
    """

    def __init__(
        self, sources: Mapping[str, ModelSource], config: EngineConfig, num_devices: int, on_gpus: bool
    ) -> None:
        devices = jax.devices()
        if on_gpus and devices[0].platform != "gpu":
            raise ConfigError(
                f"an engine of the plan was given GPUs, and JAX finds {devices[0].platform} devices in its process: "
                "install JAX for GPUs there, or have it compute on CPUs by --ray-gpus 0"
            )
        if len(devices) < num_devices:
            raise ConfigError(
                f"an engine of the plan is on {num_devices} devices, and its process has {len(devices)} "
                f"({devices[0].platform}); give it more (--ray-gpus), or name fewer in the plan"
            )
        self._host = EngineHost(load_engine(dict(sources), config, devices[:num_devices]))
        self._threads = ThreadPoolExecutor(MOST_CALLS, "fineserve call")

    async def call(self, method: str, arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
        """What a method of `EngineHost` returns, or raises."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, getattr(self._host, method), *arguments), None
        except Exception as error:
            return None, portable(error)

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces what raises, or does not answer."""
        self._host.check_health()


class ServeLink:
    """See `EngineLink`: calls go to a deployment's only replica, whichever that is.

    Args:
        handle: of the deployment.
        app: its application's name.
    """

    def __init__(self, handle: Any, app: str) -> None:
        self._handle, self._app = handle, app

    def call(self, method: str, *arguments: Any) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        timeout_s = SILENT_S if method in ("news", "send", "connect", "withdraw") else None
        try:
            answer = self._handle.call.remote(method, arguments)
            try:
                result, error = answer.result(timeout_s=timeout_s)
            except TimeoutError:
                answer.cancel()
                raise
        except (RayError, RayServeException, TimeoutError, asyncio.CancelledError) as lost:
            raise LinkLostError(f"{type(lost).__name__}: {str(lost).splitlines()[0] if str(lost) else ''}") from lost
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        from ray import serve

        serve.delete(self._app, _blocking=False)


def serve_plan(plan: Plan, options: RayServeOptions) -> Fleet:
    """Deploys the engines of a plan, and waits until their models are loaded. What is started for it on this machine
    ends with `Fleet.close`, or with this process.

    Raises:
        ConfigError: Ray is not installed, no cluster is at the address, it has too little for the engines, or one of
            them cannot be made: Ray's message says why.
    """
    ray, serve = import_ray_serve()
    is_own = _connect(ray, options)
    try:
        gpus = options.ray_gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        _check_resources(ray.cluster_resources(), plan, options, gpus)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
        apps = {name: f"fineserve-{name}" for name in plan.named}
        targets = [
            serve.RunTarget(
                _deployment(serve, name, engine, options, gpus).bind(
                    plan.sources_of(engine), plan.config_of(engine), len(engine.devices), gpus > 0
                ),
                name=apps[name],
                route_prefix=None,
            )
            for name, engine in plan.named.items()
        ]
        try:
            handles = serve.run_many(targets)
        except RuntimeError as error:
            raise ConfigError(f"an engine of the plan cannot be deployed: {error} {_reasons(serve)}") from None
        deaths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        loops = {
            name: RemoteLoop(name, ServeLink(handle, app), options.ray_replaced_within_s, deaths)
            for (name, app), handle in zip(apps.items(), handles, strict=True)
        }
    except BaseException:
        if is_own:
            serve.shutdown()
            ray.shutdown()
        raise
    fleet = Fleet(loops)
    for loop in loops.values():
        loop.give_back_to(fleet.take_back)
    return fleet


def import_ray_serve() -> tuple[Any, Any]:
    """The packages `ray` and `ray.serve`. Raises `ConfigError` where they are not installed."""
    try:
        import ray
        from ray import serve
    except ImportError:
        raise ConfigError("--ray needs Ray Serve: pip install 'fineserve-jax[ray-serve]'") from None
    return ray, serve


def _connect(ray: Any, options: RayServeOptions) -> bool:
    """Joins the cluster; whether it is one of our own."""
    if ray.is_initialized():
        return False
    try:
        ray.init(options.ray_address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray_address={options.ray_address!r}: no Ray cluster is there: {error}") from None
    return options.ray_address is None


def _check_resources(there: Mapping[str, float], plan: Plan, options: RayServeOptions, gpus: float) -> None:
    """Raises `ConfigError` for a plan that would wait for ever for what the cluster does not have."""
    if there.get("TPU"):
        raise ConfigError("the Ray cluster has TPUs, for which --ray does not ask; serve the plan without --ray there")
    wanted = {
        "CPU": options.ray_cpus * len(plan.engines),
        "GPU": gpus * sum(len(engine.devices) for engine in plan.engines),
    }
    for name, amount in wanted.items():
        if amount > there.get(name, 0.0):
            raise ConfigError(
                f"the engines of the plan take {amount:g} {name}s, and the cluster has {there.get(name, 0.0):g}; "
                f"give a smaller --ray-{name.lower()}s, fewer engines, or a larger cluster"
            )


def _reasons(serve: Any) -> str:
    """What kept engines from being made: the errors that Ray Serve tells of them."""
    told = [
        line.strip()
        for application in serve.status().applications.values()
        for deployment in application.deployments.values()
        for line in deployment.message.splitlines()
        if "Error: " in line
    ]
    return "; ".join(dict.fromkeys(told)) or "See Ray's logs."


def _deployment(serve: Any, name: str, engine: EnginePlan, options: RayServeOptions, gpus: float) -> Any:
    return serve.deployment(
        EngineDeployment,
        name=name,
        num_replicas=1,
        max_ongoing_requests=MOST_CALLS,
        max_constructor_retry_count=MOST_STARTS,
        health_check_period_s=options.ray_health_s,
        graceful_shutdown_timeout_s=1.0,
        ray_actor_options={"num_cpus": options.ray_cpus, "num_gpus": gpus * len(engine.devices)},
    )
