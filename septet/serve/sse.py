"""Answers on the wire: one JSON body, a stream of server-sent events (WHATWG HTML, section 9.2), or JSON lines.

Owned by the serve room. Knows when a response has begun (an error then travels as an event), drops a reader that does
not read, and notices a client that leaves while the work still runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from septet.serve.dialect import OPENAI_ERRORS
from septet.serve.errors import ClientGone

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from starlette.types import Receive, Send

    from septet.serve.dialect import ErrorStyle

__all__ = ["Reply", "until_gone"]

T = TypeVar("T")


class Reply:
    """One response. `status` is None until it has begun."""

    def __init__(self, send: Send, *, write_timeout_s: float, errors: ErrorStyle = OPENAI_ERRORS) -> None:
        self._send = send
        self.errors = errors
        self._patience = _Patience(write_timeout_s)
        self._encoder = msgspec.json.Encoder()
        self.status: int | None = None
        self.streaming = False
        self.ended = False
        self.stream_headers: dict[str, str] = {}  # more headers of a stream, set before its first part

    async def json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self.raw(self._encoder.encode(body), "application/json", status, headers)

    async def raw(self, body: bytes, media_type: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self._start(status, {"content-type": media_type, "content-length": str(len(body)), **(headers or {})})
        await self._body(body, more=False)

    async def download(self, parts: Iterable[bytes], media_type: str, n_bytes: int) -> None:
        """A body of `n_bytes` in parts, each asked for when the one before is taken."""
        await self._start(200, {"content-type": media_type, "content-length": str(n_bytes)})
        for part in parts:
            await self._body(part, more=True)
        await self.end()

    async def event(self, data: Any, name: str | None = None) -> None:
        """One event, of this name if given; the first one begins the stream."""
        head = b"" if name is None else b"event: " + name.encode() + b"\n"
        await self._part(head + b"data: " + self._encoder.encode(data) + b"\n\n", "text/event-stream; charset=utf-8")

    async def line(self, data: Any) -> None:
        """One line of JSON (NDJSON); the first one begins the stream."""
        await self._part(self._encoder.encode(data) + b"\n", "application/x-ndjson")

    async def done(self) -> None:
        """End the stream as OpenAI does."""
        await self._part(b"data: [DONE]\n\n", "text/event-stream; charset=utf-8")
        await self.end()

    async def end(self) -> None:
        """End the stream without a word."""
        await self._body(b"", more=False)

    async def error(self, error: BaseException) -> None:
        """Tell the client: as a body with its status, or as the last event of a stream that has begun."""
        if self.ended:
            return
        body = self.errors.body(error)
        if self.streaming:
            await self.errors.in_stream(self, body)
        elif self.status is None:
            await self.json(body, self.errors.status(error), self.errors.headers(error))

    async def _part(self, payload: bytes, media_type: str) -> None:
        if not self.streaming:
            self.streaming = True
            headers = {"content-type": media_type, "cache-control": "no-cache"}
            await self._start(200, headers | self.stream_headers)
        await self._body(payload, more=True)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._write({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, body: bytes, more: bool) -> None:
        self.ended = not more
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def _write(self, message: dict[str, Any]) -> None:
        try:
            with self._patience:
                await self._send(message)
        except (TimeoutError, OSError):  # a reader that has stopped reading, or is gone
            self.ended = True
            raise ClientGone from None


class _Patience:
    """`asyncio.timeout` for many short waits of one task, one after the other: TimeoutError after `limit_s` in one.

    There is at most one timer per `limit_s`, not one per wait: a stream waits for each token, and nearly never long.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None  # that waits now
        self._since = 0.0
        self._cancelling = 0  # cancels of the task before this wait: not ours
        self._over = False

    def __enter__(self) -> None:
        self._task, self._since, self._over = asyncio.current_task(), self._loop.time(), False
        self._cancelling = self._task.cancelling() if self._task is not None else 0
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._look)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        task, self._task = self._task, None
        if self._over and task is not None:
            ours_alone = task.uncancel() <= self._cancelling
            if ours_alone and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        end = self._since + self._limit_s
        if self._loop.time() < end:
            self._timer = self._loop.call_at(end, self._look)
        else:
            self._over = True
            self._task.cancel()


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
