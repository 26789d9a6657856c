"""Clients of a server in this process that ask when they are due, whatever it is doing, and may leave midway."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fineserve_jax import AsyncLLM
from fineserve_jax.entrypoints.server.classes import ServiceClasses
from fineserve_jax.entrypoints.server.run import listen, make_server
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.entrypoints.server.service import Service

START_S = 300.0
"""Seconds that a server has to start, its programs compiled."""
PATIENCE_S = 900.0
"""Seconds without an event after which a request counts as lost."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        outcome: "done"; "refused", with the status; "left", as the client was told to; or "lost", whatever happened.
        status: HTTP's; 0: there was none.
        ttft_s, total_s: seconds from when it was due to its first and its last event with a choice.
        tokens: that the server says it has.
        detail: of one that was refused or lost.
    """

    outcome: str
    status: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    detail: str = ""

    @property
    def tpot_s(self) -> float:
        """Seconds for each token behind the first."""
        return (self.total_s - self.ttft_s) / max(1, self.tokens - 1)


async def ask(port: int, body: dict[str, Any], due_s: float, leaves_after: int | None = None) -> Answer:
    """Asks /v1/completions for a stream at a time of the event loop's clock.

    Args:
        body: without what streaming needs.
        due_s: when to ask; latencies count from then, so that a client which is late itself hides nothing.
        leaves_after: events after which the connection is cut; None: it is read to its end.
    """
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(due_s - clock())
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    except OSError as error:
        return Answer("lost", detail=str(error))
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        status = int((await _line(reader)).split()[1])
        if status != 200:
            text = (await reader.read()).decode(errors="replace")
            return Answer("refused" if status in (404, 429, 503) else "lost", status, detail=text[-300:])
        return await _read(reader, due_s, leaves_after)
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Answer("lost", detail=f"{type(error).__name__}: {error}")
    finally:
        if leaves_after is not None:
            writer.transport.abort()
        writer.close()


async def _read(reader: asyncio.StreamReader, due_s: float, leaves_after: int | None) -> Answer:
    clock = asyncio.get_running_loop().time
    first_s = last_s = 0.0
    events: list[bytes] = []
    while line := await _line(reader):
        if not line.startswith(b"data: "):
            continue
        events.append(line[6:].strip())
        if leaves_after is not None and len(events) > leaves_after:
            return Answer("left", 200)
        if b'"choices":[{' in line:
            last_s = clock() - due_s
            first_s = first_s or last_s
    if events[-1:] != [b"[DONE]"]:
        last = (events[-1] if events else b"no event").decode(errors="replace")
        is_refused = '"code":"model_not_found"' in last  # the model went after the stream had begun
        return Answer("refused" if is_refused else "lost", 404 if is_refused else 200, detail=last[-300:])
    return Answer("done", 200, first_s, last_s, json.loads(events[-2])["usage"]["completion_tokens"])


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Raises `TimeoutError`, which is an `OSError`, if it does not come."""
    async with asyncio.timeout(PATIENCE_S):
        return await reader.readline()


@contextlib.contextmanager
def serving(llm: AsyncLLM, admin_keys: Sequence[str] = (), **settings: Any) -> Iterator[int]:
    """A server on a thread of its own, warmed up; its port."""
    config = ServerConfig(**({"port": 0} | settings))
    listening = listen(config)
    service = Service(llm, config, ServiceClasses({}, admin_keys))
    server = make_server(service)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        end = time.monotonic() + START_S
        while not server.started or service.is_starting:
            if server.error is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {server.error}")
            time.sleep(0.02)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
