"""Bodies in, JSON and event streams out; clients that leave, or stop reading, hold nobody up and nothing back."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fineserve_jax.entrypoints.openai_api.json_objects import encode_json
from fineserve_jax.entrypoints.server.errors import ApiError

T = TypeVar("T")


class Json(Response):
    """A JSON answer; errors in it may quote halves of surrogate pairs, which requests may hold."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


async def read_body(request: Request, most_bytes: int, timeout_s: float) -> bytes:
    """The body of a request.

    Raises:
        ApiError: a body that is not declared as JSON, that is too long, or that does not come.
        ClientDisconnect: the client has left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the content type is {kind!r}; send JSON, with the header Content-Type: application/json"
        raise ApiError(message, "unsupported_media_type", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise ApiError(f"the body has more than {most_bytes} bytes; send less", "body_too_large", 413)
    except TimeoutError:
        message = f"the body has not come within {timeout_s:g} s; send it faster"
        raise ApiError(message, "body_too_slow", 408, {"Connection": "close"}) from None
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], *ends: Coroutine[Any, Any, None]) -> T:
    """What the work gives. It is cancelled when the client leaves, when one of `ends` returns, or when this is
    cancelled.

    Raises:
        ClientDisconnect: the client has left, or is to be given up.
    """
    working = asyncio.ensure_future(work)
    tasks: list[asyncio.Task[Any]] = [working, *map(asyncio.ensure_future, (_left(receive), *ends))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Returns when the client has left. Its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An answer of server-sent events, as ASGI has it.

    Args:
        events: their bytes, `data: ...` and an empty line each; none is asked for before the one before it is on its
            way, so that what a slow reader has not taken is not made.
        stall_timeout_s: seconds after which a client that takes nothing is given up.
        held: is closed when the stream has ended, however it does.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], stall_timeout_s: float, held: contextlib.ExitStack) -> None:
        self._events, self._stall_timeout_s, self._held = events, stall_timeout_s, held
        self._num_begun = self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that has left, or that reads nothing, needs no further word.
        with self._held, contextlib.suppress(ClientDisconnect, OSError):
            await while_connected(receive, self._send_all(send), self._stalled())

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in events:
                self._num_begun += 1
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._num_sent += 1
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stalled(self) -> None:
        """Returns when an event has been on its way for longer than may be: one timer for all of them."""
        while True:
            sent = self._num_sent
            await asyncio.sleep(self._stall_timeout_s)
            if self._num_begun > self._num_sent == sent:
                return
