"""One client's TCP connection: ended when nothing comes of it.

Handed to uvicorn by `app.serve_forever`. Bodies and answers have clocks of their own (`body.py`, `sse.py`); here are
the times between them: a client that never sends a whole head of a request, and one that takes nothing of an answer
which was given up, so that closing would wait for it for ever. Either would hold a file descriptor as long as it likes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

__all__ = ["Connection"]


class Connection(H11Protocol):
    """uvicorn's protocol with a look at it every `head_timeout_s`: two looks without a new request, and it is cut."""

    def __init__(self, *args: Any, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timeout_s = head_timeout_s
        self._at_last_look: object = None  # the request then under way or answered; none before the first
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._next_look = self.loop.call_later(self._head_timeout_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        between = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing() or (between and self.cycle is self._at_last_look):
            self.transport.abort()
            return
        self._at_last_look = self.cycle
        self._next_look = self.loop.call_later(self._head_timeout_s, self._look)
