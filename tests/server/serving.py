"""Servers in this process, on a free port of the loopback address, and what is asked of them."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai

from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.entrypoints.server.classes import ServiceClass, ServiceClasses
from fineserve_jax.entrypoints.server.run import DrainingServer, listen, make_server
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.entrypoints.server.service import Service
from fineserve_jax.kv.integrity import check_integrity

SOON_S, PATIENCE_S = 60.0, 120.0
"""Seconds after which something that was about to happen has not happened, and a client waits no longer."""


class Running:
    """A server that runs.

    Attributes:
        client: OpenAI's, which tries nothing twice.
    """

    def __init__(self, service: Service, server: DrainingServer, port: int) -> None:
        self.service, self.server, self.port = service, server, port
        self.llm = service.llm
        self.url = f"http://127.0.0.1:{port}"
        self.client = self.client_with("none")

    def client_with(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and bytes of an answer. `body`: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def begin(self, body: dict[str, Any], path: str = "/v1/completions") -> http.client.HTTPConnection:
        """Asks, and reads nothing of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection


@contextlib.contextmanager
def serving(
    llm: AsyncLLM,
    classes: dict[str, ServiceClass] | None = None,
    sampling: Any = None,
    admin_keys: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Running]:
    """A server with an engine that others may use afterwards; it is not warmed up unless that is asked for."""
    config = ServerConfig(**({"port": 0, "warm_up": False} | settings))
    listening = listen(config)
    service = Service(llm, config, ServiceClasses(classes or {}, admin_keys), sampling)
    server = make_server(service)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Running(service, server, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(SOON_S)
        assert not thread.is_alive(), "the server did not end"
        listening.close()


def eventually(holds: Callable[[], Any], within_s: float = SOON_S) -> Any:
    """What `holds` gives as soon as that is something."""
    end = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)
    return found


def check_nothing_is_left(llm: AsyncLLM) -> None:
    """Nobody is served, and no page is held, as soon as the step that is being computed has ended."""
    eventually(lambda: not llm.engine.detokenizers)
    assert not llm.engine.kv.held
    check_integrity(llm.engine.kv)
