"""The process: uvicorn, its sockets and signals, and the end."""

import asyncio
import contextlib
import socket
import sys
from types import FrameType

import uvicorn

from fineserve_jax.entrypoints.server.app import make_app
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.entrypoints.server.service import Service
from fineserve_jax.errors import ConfigError

AFTER_DRAIN_S = 5
"""Seconds that answers have to be sent when the engine has been closed under them."""


class DrainingServer(uvicorn.Server):
    """uvicorn's, which tells the service when it is asked to end: what is being answered goes on for a while.

    A second signal ends it at once.

    Attributes:
        event_loop: that it runs on.
        error: why it could not start to serve, and has ended; None if it could.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.error: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.event_loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._warming_up = asyncio.create_task(self._warm_up())

    async def _warm_up(self) -> None:
        try:
            await self._service.warm_up()
        except Exception as error:
            if not self._service.is_draining:  # else the engine was closed under it
                self.error, self.should_exit = error, True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.event_loop is not None:
            self.event_loop.call_soon_threadsafe(self._service.begin_drain)


def make_server(service: Service) -> DrainingServer:
    """A server that can be run with sockets of `listen`."""
    config = service.config
    return DrainingServer(
        uvicorn.Config(
            make_app(service),
            http="h11",  # whose headers are limited
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.max_connections,
            h11_max_incomplete_event_size=config.MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(config.drain_s) + AFTER_DRAIN_S,
        ),
        service,
    )


def listen(config: ServerConfig) -> socket.socket:
    """A socket at the address of the settings. Raises `ConfigError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have it, too: one that takes nothing ends
        milliseconds = int(1000 * config.stall_timeout_s)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        what = error.strerror or error
        raise ConfigError(f"{config.host}:{config.port} cannot be listened at: {what}; give another port") from None
    return listening


def run_server(service: Service, listening: socket.socket) -> None:
    """Serves until the process is asked to end, by SIGINT or SIGTERM. Raises what kept it from starting."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening at http://{shown}:{port}", file=sys.stderr, flush=True)
    with contextlib.closing(listening):
        server = make_server(service)
        server.run([listening])
    if server.error is not None:
        raise server.error
