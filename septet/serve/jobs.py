"""Work of the hub behind a request: in a thread of its own, with its progress told on the loop.

Used by the Ollama dialect for pulls and creations. At most `MAX_JOBS` at once. A job whose request has gone is stopped
at its next word of progress; its thread does not keep the process alive. Knows no hub and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from septet.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

__all__ = ["Job"]

MAX_JOBS = 4
T = TypeVar("T")


class _Stopped(Exception):
    """Nobody wants the result any more."""


class Job(Generic[T]):
    """`work` gets a callback (done, total, what) and runs until it returns, raises or is stopped."""

    _n_running = 0

    def __init__(self, work: Callable[[Callable[[int, int, str], None]], T]) -> None:
        if Job._n_running >= MAX_JOBS:
            raise Overloaded(f"{MAX_JOBS} models are being fetched or made already; try again later", retry_after_s=10)
        Job._n_running += 1
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._news: dict[str, tuple[int, int]] = {}  # the last word of each phase that was not told yet
        self._event = asyncio.Event()
        self._stopped = threading.Event()
        self._result: asyncio.Future[T] = self._loop.create_future()
        threading.Thread(target=self._run, name="hub-job", daemon=True).start()

    async def progress(self) -> AsyncGenerator[tuple[str, int, int], None]:
        """(what, done, total) until the work has ended. What comes faster than it is read is left out."""
        while True:
            await self._event.wait()
            self._event.clear()
            news, self._news = self._news, {}
            for what, (done, total) in news.items():
                yield what, done, total
            if self._result.done():
                return

    async def result(self) -> T:
        """Stops the work if it is cancelled."""
        try:
            return await asyncio.shield(self._result)
        except asyncio.CancelledError:
            self.stop()
            raise

    def stop(self) -> None:
        self._stopped.set()

    # -- in the thread
    def _run(self) -> None:
        try:
            value: Any = self._work(self._tell)
            error: BaseException | None = None
        except BaseException as raised:
            value, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(self._end, value, error)

    def _tell(self, done: int, total: int, what: str) -> None:
        if self._stopped.is_set():
            raise _Stopped
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note, done, total, what)

    # -- on the loop
    def _note(self, done: int, total: int, what: str) -> None:
        self._news[what] = (done, total)
        self._event.set()

    def _end(self, value: Any, error: BaseException | None) -> None:
        Job._n_running -= 1
        if self._result.cancelled():
            return
        if error is None:
            self._result.set_result(value)
        else:
            self._result.set_exception(error)
            self._result.exception()  # the request may have gone
        self._event.set()
