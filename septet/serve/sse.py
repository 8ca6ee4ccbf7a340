"""Answers on the wire: one JSON body, or a stream of server-sent events (WHATWG HTML, section 9.2).

Owned by the serve room. Knows when a response has begun (an error then travels as an event), drops a reader that does
not read, and notices a client that leaves while the work still runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from septet.serve.errors import ClientGone, error_body, headers_of, status_of

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.types import Receive, Send

__all__ = ["Reply", "until_gone"]

T = TypeVar("T")


class Reply:
    """One response. `status` is None until it has begun."""

    def __init__(self, send: Send, *, write_timeout_s: float) -> None:
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._encoder = msgspec.json.Encoder()
        self.status: int | None = None
        self.streaming = False
        self.ended = False

    async def json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self.raw(self._encoder.encode(body), "application/json", status, headers)

    async def raw(self, body: bytes, media_type: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self._start(status, {"content-type": media_type, "content-length": str(len(body)), **(headers or {})})
        await self._body(body, more=False)

    async def event(self, data: Any) -> None:
        """One event; the first one begins the stream."""
        await self._data(self._encoder.encode(data))

    async def done(self) -> None:
        """End the stream as OpenAI does."""
        await self._data(b"[DONE]")
        await self._body(b"", more=False)

    async def error(self, error: BaseException) -> None:
        """Tell the client: as a body with its status, or as the last event of a stream that has begun."""
        if self.ended:
            return
        body = error_body(error)
        if self.streaming:
            await self.event(body)
            await self.done()
        elif self.status is None:
            await self.json(body, status_of(error), headers_of(error))

    async def _data(self, payload: bytes) -> None:
        if not self.streaming:
            self.streaming = True
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        await self._body(b"data: " + payload + b"\n\n", more=True)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._write({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, body: bytes, more: bool) -> None:
        self.ended = not more
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def _write(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send(message)
        except (TimeoutError, OSError):  # a reader that has stopped reading, or is gone
            self.ended = True
            raise ClientGone from None


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; if the client disconnects first, cancel it, wait for its clean-up and raise `ClientGone`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
